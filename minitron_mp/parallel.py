"""Start and end of a job, and its process groups. The only user of parallel_state and of the launch environment.

A job has one world, or one for each role (teacher, students). Megatron-Core calls collectives on the default process group, in
its optimizer and all over its checkpoints, so every role has a default group of its own; rank 0 is the first of the role. The
ranks of all roles are joined by a Bridge. Everything meets in the store of the job, under a prefix of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from minitron_mp import cpu
from minitron_mp.errors import InputError
from minitron_mp.sections import Parallel

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One rank's place in the job. groups: Megatron-Core's ProcessGroupCollection (tp, pp, cp, dp, dp_cp, mp, ...)."""

    parallel: Parallel
    groups: Any
    device: torch.device
    role: str = "student"
    bridge: Bridge | None = None
    """To the ranks of the other roles, in a job that has some."""
    leaving: Any = None
    """leaving.Leaving of this process; None: nobody may stop it before the end."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    @property
    def job_size(self) -> int:
        """Ranks of all roles."""
        return self.bridge.place.size if self.bridge else self.size

    @property
    def is_main(self) -> bool:
        """The one rank of a role that prints and writes small files."""
        return dist.get_rank() == 0

    @property
    def is_first_stage(self) -> bool:
        return self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    @property
    def coordinates(self) -> str:
        g = self.groups
        return f"rank {self.rank} (dp {g.dp.rank()}, pp {g.pp.rank()}, cp {g.cp.rank()}, tp {g.tp.rank()})"


@dataclass(frozen=True)
class Place:
    """Where a process is in the job."""

    store: Any
    rank: int
    size: int


@dataclass
class Bridge:
    """What joins the ranks of all roles of a job. Job ranks number them through: each role is a span of them.

    data: raw process group, NCCL on GPUs; control: raw gloo group, for small messages. They know only .send and .recv with lists
    of one tensor, a job rank and a tag, and .barrier.
    """

    role: str
    place: Place
    spans: dict[str, range]
    data: Any
    control: Any
    timeout: timedelta
    device: torch.device
    side_stream: Any = field(default=None)

    @property
    def rank(self) -> int:
        """Of this process, in the job."""
        return self.place.rank

    def stream(self, *, behind_current: bool = True) -> Any:
        """Context in which transfers are issued: a stream of their own on a GPU, behind what this thread has issued so far."""
        if self.device.type != "cuda":
            return nullcontext()
        self.side_stream = self.side_stream or torch.cuda.Stream(self.device, priority=-1)
        if behind_current:
            self.side_stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.side_stream)

    def computed(self) -> None:
        """Wait on the host for what was issued on the current stream."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def used_by_stream(self, tensor: torch.Tensor) -> None:
        """Its memory is not given to others before stream() is done with it."""
        if self.side_stream is not None:
            tensor.record_stream(self.side_stream)

    def abort(self) -> None:
        """Give up on transfers and collectives under way: on a GPU a kernel that waits for a dead rank would hold up the end of this one."""
        if self.device.type == "cuda":
            with suppress(Exception):
                self.data.abort()
                dist.distributed_c10d._abort_process_group()

    def record_event(self) -> Any:
        """What the receiving stream waits for; None on a CPU."""
        return self.side_stream.record_event() if self.side_stream is not None else None

    def report(self, reason: str) -> str:
        """Tell all ranks why the job fails; the first reason that any rank gave."""
        try:
            return self.place.store.compare_set("failed", "", reason).decode()
        except dist.DistError:  # the process that holds the store is gone
            return reason

    def reason(self, wait_s: float = 0.0) -> str | None:
        """Why the job fails, if a rank has said so within so many seconds."""
        deadline = time.monotonic() + wait_s
        with suppress(dist.DistError):
            while True:
                if self.place.store.check(["failed"]):
                    return self.place.store.get("failed").decode()
                if time.monotonic() >= deadline:
                    return None
                time.sleep(0.05)
        return None

    def blame(self, rank: int, text: str, grace_s: float = 1.0) -> str:
        """This rank's wait for another has failed with this text; the text of the rank that waits for one that waits for nobody."""
        store, chain = self.place.store, [self.rank]
        with suppress(dist.DistError):
            store.set(f"waits/{self.rank}", json.dumps([rank, text]))
            self.reason(grace_s)  # one that knows more may say it; and the others may say for whom they wait
            while rank not in chain and store.check([f"waits/{rank}"]):
                chain.append(rank)
                rank, text = json.loads(store.get(f"waits/{rank}"))
        return text

    def meet(self, topic: str) -> None:
        """Wait for all ranks of the job, for ever: they may have hours of other work. RuntimeError when one fails instead."""
        store = self.place.store
        store.add(topic, 1)
        while store.add(topic, 0) < self.place.size:
            if reason := self.reason():
                raise RuntimeError(reason)
            time.sleep(0.05)

    def exchange(
        self, topic: str, mine: Any, *, timeout_s: float | None = 0, roles: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Every role's value (json) of a topic, by role, on every rank; rank 0 of a role speaks for it. InputError when one fails instead.

        roles: that take part, default all. timeout_s: default the bridge's; None: for ever, where the others may be at work for hours before they come.
        """
        store, limit = self.place.store, timeout_s or self.timeout.total_seconds()
        if dist.get_rank() == 0:
            store.set(f"{topic}/{self.role}", json.dumps(mine))
        keys, start = {role: f"{topic}/{role}" for role in roles or self.spans}, time.monotonic()
        while not store.check(list(keys.values())):
            if reason := self.reason():
                raise InputError(reason)
            if timeout_s is not None and time.monotonic() - start > limit:
                missing = ", ".join(role for role, key in keys.items() if not store.check([key]))
                raise InputError(self.report(f"{missing} did not say its {topic} within {limit:.0f} s"))
            time.sleep(0.05)
        return {role: json.loads(store.get(key)) for role, key in keys.items()}


@contextmanager
def world(parallel: Parallel, *, seed: int, timeout_minutes: float = 30) -> Iterator[World]:
    """Join the job that torchrun started (or a job of one process), build the groups, leave at the end.

    GPU when there is one, CPU with gloo otherwise. Inside a process whose default group exists, for example a NeMo recipe or a
    test worker, that group is used and left alone.
    """
    owns = not dist.is_initialized()
    device = start(timeout_minutes) if owns else _device()
    try:
        yield build_groups(parallel, device, seed)
    finally:
        leave_groups()
        if owns and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def roles(
    layouts: Mapping[str, tuple[int, Parallel]],
    *,
    seed: int,
    timeout_minutes: float = 30,
    stream_timeout_s: float = 600,
    place: Place | None = None,
) -> Iterator[World]:
    """Join the job as the role whose span holds this rank; yields the world of the role, with the bridge to the others.

    layouts: role -> (ranks, layout), in the order of their job ranks. place: of this process; default: torchrun's. InputError when
    the ranks do not add up. When ranks fail, each raises the reason that the first of them gave.
    """
    assert not dist.is_initialized(), "roles() makes the default process groups; leave the one that is there"
    place = place or _place()
    sizes = {role: ranks for role, (ranks, _) in layouts.items()}
    if sum(sizes.values()) != place.size or min(sizes.values()) < 1:
        parts = " + ".join(f"{ranks} ({role})" for role, ranks in sizes.items())
        raise InputError(
            f"this job has {place.size} ranks, its roles have {parts}; start more (torchrun --nproc-per-node), or change teacher.ranks"
        )
    spans, first = {}, 0
    for role, ranks in sizes.items():
        spans[role], first = range(first, first + ranks), first + ranks
    role = next(role for role, span in spans.items() if place.rank in span)
    place = Place(_next_prefix(place.store), place.rank, place.size)
    device, bridge = _device(), None
    _init(
        device,
        Place(dist.PrefixStore(f"role/{role}", place.store), place.rank - spans[role].start, sizes[role]),
        timeout_minutes,
    )
    try:
        timeout = timedelta(seconds=stream_timeout_s)
        control = dist.ProcessGroupGloo(
            dist.PrefixStore("control", place.store), place.rank, place.size, timeout
        )
        # NCCL's watchdog ends the process at its timeout: later than our waits, which say who is to blame.
        kind, patience = (
            (dist.ProcessGroupNCCL, 3 * timeout)
            if device.type == "cuda"
            else (dist.ProcessGroupGloo, timeout)
        )
        data = kind(dist.PrefixStore("data", place.store), place.rank, place.size, patience)
        bridge = Bridge(role, place, spans, data, control, timeout, device)
        yield dataclasses.replace(build_groups(layouts[role][1], device, seed), role=role, bridge=bridge)
        bridge.meet("end")  # nobody tears down what a peer still uses
    except Exception as error:
        if bridge is None:
            raise
        # A collective (RuntimeError) may break before the rank that knows why has said it.
        bridge.reason(3.0 if isinstance(error, RuntimeError) else 0.0)
        bridge.abort()
        reason = bridge.report(f"{role} rank {place.rank - spans[role].start}: {error}")
        if str(error) in reason:
            raise
        raise (InputError if isinstance(error, InputError) else RuntimeError)(reason) from error
    finally:
        leave_groups()
        if dist.is_initialized():
            dist.destroy_process_group()


def place() -> Place:
    """This process in the launcher's job, before any group is made; the store, with keys of its own, joins the ranks already."""
    here = _place()
    return Place(_next_prefix(here.store), here.rank, here.size)


def device() -> torch.device:
    """What this rank computes on."""
    return _device()


def job_size() -> int:
    """Ranks of the job, before it is joined."""
    return dist.get_world_size() if dist.is_initialized() else _place().size


def ranks_per_node() -> int:
    """Of the launcher; all ranks of the job where it does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", job_size()))


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Inside, this process has the variable; for a library that asks for nothing else."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def deadline() -> float | None:
    """Seconds since 1970 by which the job should have ended, as the launcher says; None: there is none. InputError when it is no time."""
    text = os.environ.get("MINITRON_DEADLINE", "")
    try:
        return float(text) if text else None
    except ValueError:
        raise InputError(
            f"MINITRON_DEADLINE is {text!r}; give seconds since 1970, as `date +%s` prints them, or unset it"
        ) from None


def under_nsys() -> bool:
    """Whether Nsight Systems started this process."""
    return "NSYS_PROFILING_SESSION_ID" in os.environ


def start(timeout_minutes: float = 30) -> torch.device:
    """init_process_group in torchrun's job, or alone when there is none. Returns this rank's device."""
    place, device = _place(), _device()
    _init(device, Place(_next_prefix(place.store), place.rank, place.size), timeout_minutes)
    return device


def _init(device: torch.device, place: Place, timeout_minutes: float) -> None:
    options = {
        "store": place.store,
        "rank": place.rank,
        "world_size": place.size,
        "timeout": timedelta(minutes=timeout_minutes),
    }
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # gloo beside it: small host-side values (free space, errors) are reduced on the CPU
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)


_joined = itertools.count()
"""Worlds that this process has joined, the same number on every rank: each has fresh keys in the store."""


def _next_prefix(store: Any) -> Any:
    return dist.PrefixStore(f"world{next(_joined)}", store)


@functools.cache
def _place() -> Place:
    """torchrun's; alone without it. Once a process: the first call may have made the store that the others connect to."""
    if "RANK" not in os.environ:
        return Place(dist.HashStore(), 0, 1)
    return Place(*next(iter(dist.rendezvous("env://"))))


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # More ranks than GPUs: NCCL refuses two on one, unless each has a NCCL_HOSTID of its own, as the tests do it.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def build_groups(parallel: Parallel, device: torch.device, seed: int) -> World:
    """Megatron-Core's groups for this layout over the default group; InputError when the ranks do not divide."""
    cpu.install()
    size = dist.get_world_size()
    if size % parallel.model_ranks:
        p = parallel
        raise InputError(
            f"tp {p.tp} x pp {p.pp} x cp {p.cp} needs a multiple of {p.model_ranks} ranks, this job has {size}; "
            f"start {p.model_ranks} or a multiple (torchrun --nproc-per-node), or lower parallel.*"
        )
    if parallel_state.is_initialized():
        leave_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        context_parallel_size=parallel.cp,
        create_gloo_process_groups=False,  # a second set of groups over CPU; nothing here uses it
    )
    # new_group returns when this rank has connected. One that fails or finishes at once would close its sockets on ranks that
    # are still at it, and they would report that instead of the reason.
    dist.barrier()
    seed_all(seed)
    return World(parallel, ProcessGroupCollection.use_mpu_process_groups(), device)


def leave_groups() -> None:
    """Undo build_groups(). Megatron only forgets its groups; each keeps threads and sockets until it is destroyed."""
    made: set[Any] = set()
    for value in list(vars(parallel_state).values()):
        found = (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, (list, tuple))
            else [value]
        )
        made |= {group for group in found if isinstance(group, dist.ProcessGroup)}
    parallel_state.destroy_model_parallel()
    for group in made - {dist.group.WORLD}:
        with suppress(ValueError):  # destroyed already, by Megatron or as another name of the same group
            dist.destroy_process_group(group)


def seed_all(seed: int, *, cuda_graphs: bool = False) -> None:
    """Seed torch's and Megatron's random streams. The trainer does it at every step, so a resume has no state to restore.

    cuda_graphs: streams that a CUDA graph can be recorded with.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed, force_reset_rng=True, **({"te_rng_tracker": True} if cuda_graphs else {})
    )


def everyone(ok: Exception | None) -> None:
    """Raise on every rank when any rank has failed, so that nobody waits in the next collective; reached by all ranks."""
    if dist.get_world_size() == 1 and ok is None:
        return
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if ok is None else f"rank {dist.get_rank()}: {ok}")
    if ok is not None:
        raise ok
    failed = [e for e in errors if e]
    if failed:
        raise InputError("another rank failed: " + "; ".join(failed[:4]))


def on_main(action: Callable[[], T], *, takes_long: bool = False) -> T:
    """What action() returns on rank 0 (picklable), on every rank; when it fails there, every rank raises. Reached by all ranks.

    takes_long: perhaps longer than a collective waits (half an hour), such as tokenising a corpus.
    """
    box: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except OSError as error:  # a full disk, a folder that may not be written
            failure = InputError(str(error))
            failure.__cause__ = error
        except Exception as error:
            failure = error
        box[1] = failure and str(failure)
    if takes_long and dist.get_world_size() > 1:
        _wait_for_main()
    dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise InputError(f"rank 0 failed: {box[1]}")
    return box[0]


def _wait_for_main() -> None:
    """Wait until rank 0 comes here, for ever: by the store, since collectives give up. Reached by all ranks, one at a time."""
    store, key = dist.distributed_c10d._get_default_store(), "rank 0 is done"
    if dist.get_rank() == 0:
        store.set(key, "")
    while True:
        try:
            store.wait([key], timedelta(minutes=5))
            break
        except dist.DistStoreError:  # not yet; a lost store is another error
            continue
    dist.barrier()
    if dist.get_rank() == 0:
        store.delete_key(key)
