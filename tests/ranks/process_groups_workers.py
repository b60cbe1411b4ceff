"""What test_process_groups.py runs on ranks: joining and leaving worlds, with doubles of NCCL."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pool
import torch
import torch.distributed as dist
from device_guard import HostTensorOnGPU, emulated_gpu
from megatron.core import parallel_state
from project_workers import Done, minitron
from torch.testing._internal.distributed.fake_pg import FakeStore

from minitron_mp.artifacts.checkpoint import check_room
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distributed import launcher, process_groups, roles, world
from minitron_mp.distributed.launcher import JobRank
from minitron_mp.distributed.preemption import Preemption
from minitron_mp.distributed.process_groups import host_group
from minitron_mp.distributed.roles import join_roles
from minitron_mp.distributed.sync import on_rank_0, raise_on_all_ranks
from minitron_mp.distributed.world import build_groups, join_world

GPU = torch.device("cuda", 0)


@contextlib.contextmanager
def own_job() -> Iterator[None]:
    """The next world makes the default group itself, as under torchrun."""
    with pool.without_group(), patch.object(launcher, "job_rank", lambda: JobRank(*pool.here["place"])):
        yield


@contextlib.contextmanager
def recorded_shutdowns() -> Iterator[list[str]]:
    """Yield the names of the groups that are shut down in this context, in their order."""
    names: list[str] = []
    shutdown = dist.ProcessGroup.shutdown

    def record(group: dist.ProcessGroup) -> None:
        names.append(group.group_name)
        shutdown(group)

    with patch.object(dist.ProcessGroup, "shutdown", record):
        yield names


def shut_down(*, layout: dict[str, int], owns_default: bool) -> list[str]:
    """Return the groups that this rank shuts down when it leaves a world, in their order."""
    with own_job() if owns_default else contextlib.nullcontext(), recorded_shutdowns() as names:
        with join_world(ParallelConfig(**layout), seed=1):
            names.clear()
        return list(names)


def inside_nemo(*, outer: dict[str, int], inner: dict[str, int]) -> tuple[float, float]:
    """Return sums over a NeMo recipe's groups after a world inside the recipe has ended.

    The sum over its tensor-parallel group by parallel_state, and over a group that it made itself.
    """
    parallel_state.initialize_model_parallel(**outer)  # with its gloo groups
    separate = dist.new_group(list(range(dist.get_world_size())))
    before = set(process_groups.all_groups())
    with join_world(ParallelConfig(**inner), seed=1) as joined:
        assert joined.groups.pp.size() == inner["pp"]
        assert set(process_groups.all_groups()) > before
    assert set(process_groups.all_groups()) == before
    sums = []
    for group in (parallel_state.get_tensor_model_parallel_group(), separate):
        value = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(value, group=group)
        sums.append(value.item())
    parallel_state.destroy_model_parallel()
    process_groups.end_groups(
        [group for group in before if group is not dist.group.WORLD], torch.device("cpu"), is_failed=False
    )
    return sums[0], sums[1]


@contextlib.contextmanager
def simulated_gpu() -> Iterator[list[str]]:
    """Let a world choose the path of a GPU with NCCL; yield the ends of its groups, in their order."""
    ends: list[str] = []
    init, abort, destroy = (
        dist.init_process_group,
        dist.distributed_c10d._abort_process_group,
        dist.destroy_process_group,
    )

    def init_gloo(backend: str, **options: Any) -> None:
        ends.append(f"init {backend} {sorted(options)}")
        init("gloo", **options)

    def record(name: str, action: Any) -> Any:
        def run(*arguments: Any) -> None:
            ends.append(name)
            action(*arguments)

        return run

    def raw_group(store: Any, rank: int, size: int, timeout: Any) -> Any:
        ends.append("raw group")
        return dist.ProcessGroupGloo(store, rank, size, timeout)

    process_groups_of = dist.distributed_c10d
    with (
        patch.object(world, "local_device", lambda: GPU),
        patch.object(roles, "local_device", lambda: GPU),
        patch.object(torch.cuda, "set_device", lambda device: None),
        patch.object(torch.cuda, "synchronize", lambda device=None: None),
        patch.object(dist, "init_process_group", init_gloo),
        patch.object(dist, "destroy_process_group", record("destroy", destroy)),
        patch.object(process_groups_of, "_abort_process_group", record("abort", abort)),
        patch.object(dist, "ProcessGroupNCCL", raw_group, create=True),
    ):
        yield ends


class Fault(Exception):
    """The failure of one rank."""


def fail(*, role: bool) -> tuple[list[str], bool]:
    """Return how the groups of a rank with a GPU ended after a failure, and whether one is left."""
    with own_job():
        with simulated_gpu() as ends, contextlib.suppress(Fault):
            if role:
                with join_roles({"student": (1, ParallelConfig())}, seed=1):
                    raise Fault
            else:
                with join_world(ParallelConfig(), seed=1):
                    raise Fault
        return ends, dist.is_initialized()


def succeed() -> list[str]:
    """Return how the groups of a rank with a GPU ended without a failure."""
    with own_job(), simulated_gpu() as ends:
        with join_roles({"student": (1, ParallelConfig())}, seed=1):
            pass
        return ends


def abort_that_waits() -> tuple[float, bool]:
    """Return the seconds of a failure whose abort waits for other ranks, and whether exit is hard."""
    exits = []
    with own_job():
        with (
            simulated_gpu(),
            patch.object(process_groups, "ABORT_S", 0.2),
            patch.object(process_groups.atexit, "register", exits.append),
            patch.object(dist.distributed_c10d, "_abort_process_group", lambda: time.sleep(2)),
            contextlib.suppress(Fault),
            join_world(ParallelConfig(), seed=1),
        ):
            start = time.monotonic()
            raise Fault
        seconds = time.monotonic() - start
        dist.destroy_process_group()
    return seconds, exits == [process_groups._exit_without_destructors]


def one_fails() -> float:
    """Return the seconds after which a rank in a collective ends because another rank has failed."""
    start, rank = 0.0, dist.get_rank()
    with contextlib.suppress(Fault, RuntimeError), contextlib.ExitStack() as stack:
        stack.enter_context(own_job())
        joined = stack.enter_context(join_world(ParallelConfig(tp=2), seed=1))
        start = time.monotonic()
        if rank == 1:
            raise Fault
        dist.all_reduce(torch.zeros(1), group=joined.groups.tp)
    return time.monotonic() - start


def count_groups(*, layout: dict[str, int], num_ranks: int) -> dict[str, int]:
    """Return backend -> groups that one of `num_ranks` ranks makes; "inherited" is the default group's.

    The default group has no backend for host memory, as that of NCCL.
    """
    counts: Counter[str] = Counter()
    new_group = dist.new_group

    def count(ranks: Any = None, **options: Any) -> Any:
        counts[options.pop("backend", None) or "inherited"] += 1
        return new_group(ranks, **options)

    with pool.without_group():
        dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
        with (
            patch.object(dist, "new_group", count),
            patch.object(process_groups, "CPU", torch.device("xla")),
            patch.object(process_groups, "timeout_of", lambda group, device: None),
        ):
            joined = build_groups(ParallelConfig(**layout), torch.device("cpu"), 1)
            assert joined.size == num_ranks
            assert host_group() is host_group()
        world.leave_job(torch.device("cpu"))
        assert not process_groups._host_groups
    return dict(counts)


def compress(*, arguments: list[str]) -> tuple[Done, dict[str, int]]:
    """Run the command line over emulated groups of NCCL; return its end, and their collectives."""
    with emulated_gpu() as collectives:
        return minitron(arguments=arguments, own_job=True), dict(collectives)


def checks_over_nccl(*, folder: Path) -> int:
    """Run the checks between stages over emulated groups of NCCL; return the number of refusals.

    The refusals are of a tensor in host memory on the default group, which is refused once.
    """
    num_refusals = 0
    with own_job(), emulated_gpu(), join_world(ParallelConfig(tp=2), seed=1) as joined:
        check_room(1.0, folder)
        Preemption(folder).raise_if_requested("here", joined.is_main)
        assert on_rank_0(lambda: 3, takes_long=True) == 3
        raise_on_all_ranks(None)
        value = torch.ones(1, device=joined.device)
        dist.all_reduce(value * 2)
        try:
            dist.all_reduce(value.cpu())
        except HostTensorOnGPU:
            num_refusals += 1
    return num_refusals
