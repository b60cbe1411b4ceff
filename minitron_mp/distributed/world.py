"""Start and end of a job, and its process groups. The only user of parallel_state and of the launch environment.

A job has one world, or one for each role (teacher, students). Megatron-Core calls collectives on the default process group, in
its optimizer and all over its checkpoints, so every role has a default group of its own; rank 0 is the first of the role. The
ranks of all roles are joined by a Bridge. Everything meets in the store of the job, under a prefix of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distributed import launcher
from minitron_mp.distributed.cpu_backend import install
from minitron_mp.distributed.launcher import JobRank, fresh_prefix, local_device
from minitron_mp.distributed.preemption import Preemption
from minitron_mp.distributed.role_channel import RoleChannel
from minitron_mp.errors import InputError


@dataclass(frozen=True)
class World:
    """One rank's place in the job. groups: Megatron-Core's ProcessGroupCollection (tp, pp, cp, dp, dp_cp, mp, ...)."""

    parallel: ParallelConfig
    groups: Any
    device: torch.device
    role: str = "student"
    channel: RoleChannel | None = None
    """To the ranks of the other roles. None in a job with one role."""
    preemption: Preemption | None = None
    """Stop requests that this process has received. None: the job always runs to its end."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    @property
    def job_size(self) -> int:
        """Ranks of all roles."""
        return self.channel.place.size if self.channel else self.size

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


@contextmanager
def join_world(parallel: ParallelConfig, *, seed: int, timeout_minutes: float = 30) -> Iterator[World]:
    """Join the job that torchrun started (or a job of one process), build the groups, leave at the end.

    GPU when there is one, CPU with gloo otherwise. Inside a process whose default group exists, for example a NeMo recipe or a
    test worker, that group is used and left alone.
    """
    owns = not dist.is_initialized()
    device = start_job(timeout_minutes) if owns else local_device()
    try:
        yield build_groups(parallel, device, seed)
    finally:
        leave_groups()
        if owns and dist.is_initialized():
            dist.destroy_process_group()


def start_job(timeout_minutes: float = 30) -> torch.device:
    """init_process_group in torchrun's job, or alone when there is none. Returns this rank's device."""
    place, device = launcher.job_rank(), local_device()
    init_default_group(device, JobRank(fresh_prefix(place.store), place.rank, place.size), timeout_minutes)
    return device


def init_default_group(device: torch.device, place: JobRank, timeout_minutes: float) -> None:
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


def build_groups(parallel: ParallelConfig, device: torch.device, seed: int) -> World:
    """Megatron-Core's groups for this layout over the default group; InputError when the ranks do not divide."""
    install()
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
