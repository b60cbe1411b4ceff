"""Start and end of a job, and its process groups. The only user of parallel_state and of the launch environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from minitron_mp import cpu
from minitron_mp.config import InputError, Parallel

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One rank's place in the job. groups: Megatron-Core's ProcessGroupCollection (tp, pp, cp, dp, dp_cp, mp, ...)."""

    parallel: Parallel
    groups: Any
    device: torch.device

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """The one rank that prints and writes small files."""
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


def start(timeout_minutes: float = 30) -> torch.device:
    """init_process_group from torchrun's environment, or alone when there is none. Returns this rank's device."""
    device = _device()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    options: dict[str, Any] = {"timeout": timedelta(minutes=timeout_minutes), **alone}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # gloo beside it: small host-side values (free space, errors) are reduced on the CPU
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)
    return device


def _device() -> torch.device:
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


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
        found = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        made |= {group for group in found if isinstance(group, dist.ProcessGroup)}
    parallel_state.destroy_model_parallel()
    for group in made - {dist.group.WORLD}:
        with suppress(ValueError):  # destroyed already, by Megatron or as another name of the same group
            dist.destroy_process_group(group)


def seed_all(seed: int) -> None:
    """Seed torch's and Megatron's random streams. The trainer does it at every step, so a resume has no state to restore."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


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


def on_main(action: Callable[[], T]) -> T:
    """What action() returns on rank 0 (picklable), on every rank; when it fails there, every rank raises. Reached by all ranks."""
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
    dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise InputError(f"rank 0 failed: {box[1]}")
    return box[0]
