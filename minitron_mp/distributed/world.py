"""World: parallel layout and process groups of a rank.

Only this file and cpu_backend.py use parallel_state. A job has one world, or one world for each
role (teacher, students; see roles.py). Each world has a separate default process group, because
Megatron-Core calls collectives on that group in its optimizer and in its checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distributed import launcher
from minitron_mp.distributed.cpu_backend import install
from minitron_mp.distributed.launcher import local_device
from minitron_mp.distributed.preemption import Preemption
from minitron_mp.distributed.process_groups import (
    all_groups,
    connect,
    end_default_group,
    end_groups,
    init_default_group,
)
from minitron_mp.distributed.role_channel import RoleChannel
from minitron_mp.errors import InputError


@dataclass(frozen=True)
class World:
    """Layout, process groups and device of one rank.

    groups: Megatron-Core's ProcessGroupCollection (tp, pp, cp, dp, dp_cp, mp, ...).
    """

    parallel: ParallelConfig
    groups: Any
    device: torch.device
    role: str = "student"
    channel: RoleChannel | None = None
    """Channel to the ranks of the other roles. None in a job with one role."""
    preemption: Preemption | None = None
    """Stop requests that this process has received. None: the job always runs to its end."""

    @property
    def rank(self) -> int:
        """Rank in this world."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """Number of ranks of this world."""
        return dist.get_world_size()

    @property
    def job_size(self) -> int:
        """Number of ranks of all roles."""
        return self.channel.job.size if self.channel else self.size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 of its role, which prints and writes small files."""
        return dist.get_rank() == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank is on the first pipeline stage."""
        return self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank is on the last pipeline stage."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    @property
    def coordinates(self) -> str:
        """Rank and position in the layout, for error messages."""
        g = self.groups
        return f"rank {self.rank} (dp {g.dp.rank()}, pp {g.pp.rank()}, cp {g.cp.rank()}, tp {g.tp.rank()})"

    def coordinates_of(self, rank: int) -> str:
        """Return the coordinates of another rank. Megatron's order is tp fastest, cp, dp, pp."""
        p = self.parallel
        rest, tp = divmod(rank, p.tp)
        rest, cp = divmod(rest, p.cp)
        pp, dp = divmod(rest, self.size // p.model_ranks)
        return f"rank {rank} (dp {dp}, pp {pp}, cp {cp}, tp {tp})"


@contextmanager
def join_world(parallel: ParallelConfig, *, seed: int, timeout_minutes: float = 30) -> Iterator[World]:
    """Join torchrun's job, or a job of one process, and yield the world of this rank.

    It uses a GPU if the machine has one, else the CPU with gloo. If the process already has a
    default process group (a NeMo recipe, a test), that group is used. It is not destroyed, nor are
    other groups that existed before, and Megatron-Core's parallel_state is restored at the end.
    timeout_minutes: timeout of the collectives. If a rank fails on a GPU, its groups are aborted. When
    NCCL does not finish that, the process later ends with exit code 1.
    """
    owns_default = not dist.is_initialized()
    device = start_job(timeout_minutes) if owns_default else local_device()
    earlier = all_groups()
    is_failed = True
    with nullcontext() if owns_default else _own_parallel_state():
        try:
            try:
                world = build_groups(parallel, device, seed, timeout_minutes)
            finally:
                made = [group for group in all_groups() if group not in earlier]
            yield world
            is_failed = False
        finally:
            if owns_default:
                leave_job(device, is_failed=is_failed)
            else:
                end_groups(made, device, is_failed=is_failed)


@contextmanager
def _own_parallel_state() -> Iterator[None]:
    """Give Megatron-Core's parallel_state an empty state in this context, and then its earlier one.

    So a NeMo recipe finds its groups as before.
    """
    earlier = {
        name: value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and not name.startswith("__") and not callable(value)
    }
    empty: dict[str, Any] = {name: {} if isinstance(value, dict) else None for name, value in earlier.items()}
    vars(parallel_state).update(empty)
    try:
        yield
    finally:
        vars(parallel_state).update(earlier)


def start_job(timeout_minutes: float = 30) -> torch.device:
    """Make the default process group of torchrun's job or of this process; return the device."""
    device = local_device()
    init_default_group(device, launcher.job_rank().with_fresh_keys(), timeout_minutes)
    return device


def build_groups(
    parallel: ParallelConfig, device: torch.device, seed: int, timeout_minutes: float = 30
) -> World:
    """Make Megatron-Core's process groups for a layout, and return the world of this rank.

    InputError when the layout does not divide the number of ranks. Reached by all ranks.
    """
    install()
    size = dist.get_world_size()
    if size % parallel.model_ranks:
        p = parallel
        raise InputError(
            f"tp {p.tp} x pp {p.pp} x cp {p.cp} needs a multiple of {p.model_ranks} ranks, this job "
            f"has {size}; start {p.model_ranks} or a multiple (torchrun --nproc-per-node), or lower "
            "parallel.*"
        )
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,  # a second set of groups on the CPU, which is not used
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    connect([groups.tp, groups.cp, groups.pp, groups.dp, groups.dp_cp, groups.mp], device)
    seed_all(seed)
    return World(parallel, groups, device)


def leave_job(device: torch.device, *, is_failed: bool = False) -> None:
    """Destroy all process groups of this process; abort those of NCCL if this rank has failed.

    Megatron only deletes its references, so threads and sockets of its groups would remain.
    """
    parallel_state.destroy_model_parallel()
    end_default_group(device, is_failed=is_failed)


def seed_all(seed: int, *, cuda_graphs: bool = False) -> None:
    """Seed torch's and Megatron's random streams.

    The training loop calls it at every step, so a checkpoint needs no random state. cuda_graphs:
    use streams that a CUDA graph can record.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    if cuda_graphs:
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True, te_rng_tracker=True)
    else:
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
