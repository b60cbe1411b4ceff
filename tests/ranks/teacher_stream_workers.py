"""Worker functions for the teacher stream tests: roles in one job, with plain signals or models."""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pool
import torch
import torch.distributed as dist
from cases import RESUME_AT, SEQUENCE_LENGTH, Layout, make_samples, microbatches, settings
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from model_workers import joined, load
from torch import Tensor
from training_workers import Runner

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distillation import serve
from minitron_mp.distillation.receiver import Receiver, _Ended
from minitron_mp.distillation.serve import ServedTeacher, serve_signals
from minitron_mp.distillation.stream import Link, Sender, StreamError
from minitron_mp.distillation.stream_layout import Grid, StreamShape, columns_of, rows_of
from minitron_mp.distillation.stream_pairs import connect_pairs
from minitron_mp.distillation.teacher import ColocatedTeacher, RemoteTeacher
from minitron_mp.distillation.teacher_head import load_head
from minitron_mp.distributed.launcher import JobRank, fresh_prefix
from minitron_mp.distributed.roles import join_roles
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.losses.objective import TeacherLogits
from minitron_mp.models.arch import Arch
from minitron_mp.models.sharded_model import logits
from minitron_mp.training.metrics import StepMetrics

Roles = dict[str, tuple[int, dict[str, Any]]]
"""role -> (ranks, arguments of Parallel)"""


@contextmanager
def joined_roles(roles: Roles, timeout_s: float = 60.0) -> Iterator[World | None]:
    """The world of this rank's role; None on ranks of the pool that no role wants."""
    store, rank, _ = pool.here["place"]
    wanted, refused = sum(ranks for ranks, _ in roles.values()), None
    with pool.without_group():
        if rank >= wanted:
            fresh_prefix(store)  # every rank counts the worlds of the job
            yield None
            return
        layouts = {role: (ranks, ParallelConfig(**p)) for role, (ranks, p) in roles.items()}
        options = {
            "timeout_minutes": timeout_s / 60,
            "stream_timeout_s": timeout_s,
            "job": JobRank(store, rank, wanted),
        }
        try:
            with join_roles(layouts, seed=1, **options) as world:
                pool.here["coordinates"] = f"{world.role} {world.coordinates}"
                yield world
        except InputError as error:  # all ranks have it: they go on together
            refused = error
        RotaryEmbedding.forward.cache_clear()
    if refused is not None:
        raise refused


def make_link(world: World, roles: Roles, shape: StreamShape, window: int) -> Link:
    channel = world.channel
    grids = {}
    for role, (ranks, p) in roles.items():
        layout = ParallelConfig(**p)
        grids[role] = Grid(role, layout, ranks // layout.model_ranks, channel.spans[role].start)
    return Link(
        channel, shape, grids["teacher"], [grid for role, grid in grids.items() if role != "teacher"], window
    )


def whole_signal(shape: StreamShape, id: int) -> Tensor:
    """[s, b, n] of a microbatch, known to both ends."""
    generator = torch.Generator().manual_seed(id)
    return torch.randn((shape.sequence_length, shape.micro_batch_size, shape.width), generator=generator).to(
        shape.dtype
    )


def local_signal(shape: StreamShape, p: ParallelConfig, id: int, cp: int, tp: int) -> Tensor:
    """[s', b, n'] of one place."""
    whole, columns = whole_signal(shape, id), slice(*columns_of(shape, p, tp))
    return torch.cat([whole[first:end, :, columns] for first, end, _ in rows_of(shape, p, cp, tp)])


def transport(
    roles: Roles,
    shape: StreamShape,
    window: int,
    count: int,
    seed: int = 0,
    delay_s: float = 0.0,
    die: str = "",
) -> dict[str, Any]:
    """Stream `count` plain signals with random delays on both sides; return what each end saw.

    die: "ROLE RANK PHASE", see _fault.
    """
    with joined_roles(roles, timeout_s=3.0 if die else 60.0) as world:
        return {} if world is None else _stream(world, roles, shape, window, count, seed, delay_s, die)


def transports(
    roles: Roles, cases: list[tuple[StreamShape, int]], count: int, delay_s: float
) -> list[dict[str, Any]]:
    """transport() of each (shape, window), one after the other over one channel."""
    with joined_roles(roles) as world:
        return [
            {} if world is None else _stream(world, roles, shape, window, count, window, delay_s)
            for shape, window in cases
        ]


def _stream(
    world: World,
    roles: Roles,
    shape: StreamShape,
    window: int,
    count: int,
    seed: int,
    delay_s: float,
    die: str = "",
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    link = make_link(world, roles, shape, window)
    g, chance, fault = world.groups, random.Random(seed * 100 + world.channel.rank), _Fault(world, die)

    def pause() -> None:
        time.sleep(delay_s * chance.random())

    if not world.is_last_stage:
        return found
    place, data = (g.cp.rank(), g.tp.rank()), link.channel.data
    if world.role == "teacher":
        sender, most_in_flight = Sender(link), 0
        for id in range(count):
            if id % link.teacher.dp == g.dp.rank():
                sender.make_room()
                pause()
                fault("before announcing", id)
                if die:
                    link.channel.data = _Watched(data, lambda id=id: fault("while sending", id))
                sender.send(id, local_signal(shape, link.teacher.parallel, id, *place))
                most_in_flight = max(most_in_flight, len(sender.in_flight))
                fault("after sending", id)
        sender.finish()
        found["in flight"] = most_in_flight
    else:
        grid = next(grid for grid in link.students if grid.role == world.role)
        ids = [id for id in range(count) if id % grid.dp == g.dp.rank()]
        receiver, wrong, held = Receiver(link, grid, ids, world.device), [], 0
        for n, id in enumerate(ids):
            held = max(held, len(receiver.arrived))
            signal = receiver.get(id)
            fault("before the credit", id)
            if not torch.equal(signal, local_signal(shape, grid.parallel, id, *place)):
                wrong.append(id)
            pause()
            receiver.release(id)
            fault("after the credit", id)
            if n == len(ids) // 4:
                found["memory at a quarter"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        receiver.close()
        found |= {
            "wrong": wrong,
            "held": held,
            "received": len(ids),
            "memory at the end": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
    found["bytes"] = link.num_bytes
    return found


class _Fault:
    """Lets one rank die, hang or fail at one point: "teacher 0 kill before announcing 3"."""

    def __init__(self, world: World, text: str):
        role, rank, self.kind, self.place = (text.split(" ", 3) + [""] * 4)[:4]
        self.mine = bool(text) and role == world.role and int(rank) == dist.get_rank()

    def __call__(self, phase: str, id: int) -> None:
        if self.mine and self.place == f"{phase} {id}":
            if self.kind == "kill":
                os._exit(9)
            if self.kind == "hang":
                time.sleep(30)
            raise ValueError("this rank has a defect")


class _Watched:
    """A process group that does something before it sends."""

    def __init__(self, group: Any, before: Any):
        self.group, self.before = group, before

    def send(self, *arguments: Any) -> Any:
        self.before()
        return self.group.send(*arguments)


def disordered(roles: Roles, shape: StreamShape, announced: int, due: int) -> str:
    """The error of a student to which microbatch `announced` is announced where `due` is due."""
    with joined_roles(roles, timeout_s=3.0) as world:
        link = make_link(world, roles, shape, 3)
        if world.role == "teacher":
            world.channel.control.send([torch.tensor([announced])], link.students[0].first, 1).wait()
            time.sleep(0.5)
            return ""
        receiver, text = Receiver(link, link.students[0], [due], world.device), ""
        try:
            receiver.get(due)
        except RuntimeError as error:
            text = str(error)
        receiver.close()
        world.channel.store.delete_key("failed")  # so that the roles part as if nothing had been
        return text


def ends_early(
    roles: Roles, shape: StreamShape, window: int, last: int, late_s: float, *, read_on: bool = False
) -> int | str:
    """Number of signals of a stream of 8 that ends before signal `last`.

    Each thread of a student receives `late_s` after it may. read_on: the student calls get() for
    signal `last`; return its error.
    """

    def serve() -> None:
        sender = Sender(link)
        for id in range(last):
            sender.make_room()
            sender.send(id, whole_signal(shape, id))
        sender.end(last, 8)
        sender.finish()

    with joined_roles(roles, timeout_s=5.0) as world:
        link = make_link(world, roles, shape, window)
        if world.role == "teacher":
            serve()  # its sender is gone afterwards, but its groups are not
            return last
        receive = Receiver._receive

        def late(receiver: Receiver, id: int) -> Any:
            time.sleep(late_s)
            return receive(receiver, id)

        with patch.object(Receiver, "_receive", late):
            receiver = Receiver(link, link.students[0], range(8), world.device)
            for id in range(last):
                receiver.get(id)
                receiver.release(id)
            if read_on:
                text = ""
                try:
                    receiver.get(last)
                except StreamError as error:
                    text = str(error)
            receiver.close()
        if read_on:
            return text
        assert isinstance(receiver.failure, _Ended)
        assert not receiver.arrived
        return last


def connected(roles: Roles, shape: StreamShape, absent: str = "") -> str:
    """Connect the pairs of a stream; return the error, "" without one.

    absent: role whose first rank does not take part.
    """
    with joined_roles(roles) as world:
        link = make_link(world, roles, shape, 3)
        if absent:
            world.channel.timeout = timedelta(seconds=0.3)
        if world.role == absent and dist.get_rank() == 0:
            world.channel.store.wait(["absence is over"])
            return ""
        text = ""
        try:
            connect_pairs(link)
        except StreamError as error:
            text = str(error)
        if absent:  # so that the roles part as if nothing had been
            world.channel.store.delete_key("failed")
            world.channel.store.set("absence is over", "")
        return text


def silent_transfer(roles: Roles, shape: StreamShape) -> str:
    """Return the error of a student whose thread is in a call that does not return."""
    with joined_roles(roles) as world:
        link = make_link(world, roles, shape, 3)
        if world.role == "teacher":
            world.channel.store.wait(["the transfer has failed"])
            return ""
        world.channel.timeout = timedelta(seconds=0.3)
        text = ""
        with patch.object(Receiver, "_receive", lambda receiver, id: time.sleep(2)):
            receiver = Receiver(link, link.students[0], [0], world.device)
            try:
                receiver.get(0)
            except StreamError as error:
                text = str(error)
            receiver.close()
        world.channel.store.delete_key("failed")
        world.channel.store.set("the transfer has failed", "")
        return text


def order_of_work(*, window: int, pp: int, count: int) -> list[str]:
    """Return the forward passes and sends of a teacher with `count` microbatches, in their order."""
    order: list[str] = []

    class Recorder:
        """Consumes each signal at the next make_room()."""

        in_flight = 0

        def make_room(self, count: int = 1) -> None:
            assert count <= window
            self.in_flight = min(self.in_flight, window - count)

        def send(self, id: int, signal: Tensor, computed: Any = None) -> None:
            self.in_flight += 1
            assert self.in_flight <= window
            order.append(f"send {id}")

        def end(self, first: int, last: int) -> None: ...

        def finish(self) -> None:
            order.append("finish")

    def signals(teacher: Any, capture: Any, batches: list[int]) -> list[Tensor]:
        order.extend(f"forward {id}" for id in batches)
        return [torch.zeros(1) for _ in batches]

    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    world = SimpleNamespace(
        groups=SimpleNamespace(dp=one),
        parallel=ParallelConfig(pp=pp),
        device=torch.device("cpu"),
        preemption=None,
    )
    served = ServedTeacher(SimpleNamespace(world=world), None, window)
    with patch.object(serve, "_signals", signals):
        serve_signals(served, Recorder(), lambda id: id, range(count))
    return order


def wrong_credit(roles: Roles, shape: StreamShape) -> str:
    """The error of a teacher that gets credit for another microbatch than the one that is due."""
    with joined_roles(roles, timeout_s=3.0) as world:
        link = make_link(world, roles, shape, 3)
        if world.role == "student":
            number = torch.empty(1, dtype=torch.int64)
            signal = torch.empty(shape.local(ParallelConfig()), dtype=shape.dtype)
            world.channel.control.recv([number], link.teacher.first, 1).wait()
            world.channel.data.recv([signal], link.teacher.first, 3).wait()
            world.channel.control.send([number + 1], link.teacher.first, 2).wait()
            time.sleep(0.5)
            return ""
        sender, text = Sender(link), ""
        sender.send(4, whole_signal(shape, 4))
        try:
            sender.finish()
        except RuntimeError as error:
            text = str(error)
        world.channel.store.delete_key("failed")
        return text


def contract(roles: Roles, **other: Any) -> str:
    """The refusal of a contract that differs in some fields, on this rank."""
    from minitron_mp.workflow.teacher_stream import StreamStart, compare_settings

    mine: dict[str, Any] = {"sequence_length": "24", "payload": "hidden", "window": 3}
    try:
        with joined_roles(roles) as world:
            settings = mine | other if world.role == "teacher" else mine
            compare_settings(world.channel, ["student"], settings, StreamStart(0, []))
    except InputError as error:
        return str(error)
    return ""


def train_with(
    student: Layout,
    teacher: Layout | None,
    payload: str,
    window: int,
    arch: Arch,
    weights: Path,
    student_arch: Arch,
    student_weights: Path,
    output: Path,
) -> list[StepMetrics]:
    """Run the steps of training_workers.train_everything with a remote or colocated teacher.

    teacher: the layout of a remote teacher; None is a colocated one that hands over the payload.
    Returns the metrics of the student's rank 0, [] elsewhere.
    """
    chosen, start = (
        settings(student).model_copy(update={"steps": RESUME_AT}),
        {"arch": student_arch, "start": student_weights, "checkpoints": output},
    )
    if teacher is None:
        with joined(student) as world:
            placement = ColocatedLogits if payload == "logits" else ColocatedTeacher
            local = placement(load(arch, weights, world))
            return Runner(world, local, chosen)(**start).metrics
    roles = {"student": (student.ranks, student.parallel), "teacher": (teacher.ranks, teacher.parallel)}
    per_step = chosen.global_batch_size // chosen.micro_batch_size
    width = arch.hidden_size if payload == "hidden" else arch.padded_vocab_size
    shape = StreamShape(payload, SEQUENCE_LENGTH, chosen.micro_batch_size, width, torch.float32)

    def batch_of(id: int) -> dict[str, Tensor]:
        samples = make_samples(arch, id // per_step, chosen.global_batch_size)
        return microbatches(samples, chosen.micro_batch_size, id % per_step, per_step)[0]

    with joined_roles(roles) as world:
        if world is None:
            return []
        link, ids, is_last = (
            make_link(world, roles, shape, window),
            range(chosen.steps * per_step),
            world.is_last_stage,
        )
        if world.role == "teacher":
            model = load(arch, weights, world).freeze()
            sender = Sender(link) if is_last else None
            serve_signals(ServedTeacher(model, shape, window), sender, batch_of, ids)
            return []
        dp = world.groups.dp
        receiver = (
            Receiver(link, link.students[0], ids[dp.rank() :: dp.size()], world.device) if is_last else None
        )
        head = load_head(arch, weights, world, torch.float32) if payload == "hidden" else None
        remote = RemoteTeacher(receiver, payload, head, world)
        metrics = Runner(world, remote, chosen)(**start).metrics
        remote.close()
        return metrics


class ColocatedLogits(ColocatedTeacher):
    """Makes the logits of a whole microbatch, as a remote teacher that sends them does."""

    def target(self, signal: Any) -> TeacherLogits:
        return TeacherLogits(logits(self.model.last_chunk, signal.hidden))
