"""Values that the launcher (torchrun, Slurm, Nsight Systems) sets in a process's environment.

Except for RANK in console.py, no other file of the package reads launch variables. A process
without a launcher is a job of one rank.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from minitron_mp.errors import InputError


@dataclass(frozen=True)
class JobRank:
    """The rank of this process in the job, over all roles, and the store that all ranks share."""

    store: dist.Store
    rank: int
    size: int

    def with_fresh_keys(self) -> JobRank:
        """Return the same rank with a store whose keys no other world of this job uses.

        The prefix counts the calls, so all ranks must call it the same number of times.
        """
        return replace(self, store=fresh_prefix(self.store))


@functools.cache
def job_rank() -> JobRank:
    """Return torchrun's rank of this process, or rank 0 of 1 without torchrun.

    The result is cached, because the first call on rank 0 may create the store of the job.
    """
    if "RANK" not in os.environ:
        return JobRank(dist.HashStore(), 0, 1)
    return JobRank(*next(iter(dist.rendezvous("env://"))))


_num_worlds = itertools.count()
"""Counts the worlds that this process has joined. The count is the same on every rank."""


def fresh_prefix(store: dist.Store) -> dist.Store:
    """Return the store under a new prefix, which is the same on every rank."""
    return dist.PrefixStore(f"world{next(_num_worlds)}", store)


def num_job_ranks() -> int:
    """Return the number of ranks of the job. It also works before process groups exist."""
    return dist.get_world_size() if dist.is_initialized() else job_rank().size


def ranks_per_node() -> int:
    """Return the launcher's ranks per node, or all ranks of the job if it gives none."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_job_ranks()))


def local_device() -> torch.device:
    """Return the device of this rank: the GPU of its local rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # The modulo allows more ranks than GPUs, as in the tests. NCCL rejects two ranks on one GPU
    # unless each has a different NCCL_HOSTID.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable in this context, for a library that has no argument for it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def job_deadline() -> float | None:
    """Return the launcher's deadline of the job in seconds since 1970, or None without one.

    InputError when MINITRON_DEADLINE is not a number.
    """
    text = os.environ.get("MINITRON_DEADLINE", "")
    try:
        return float(text) if text else None
    except ValueError:
        raise InputError(
            f"MINITRON_DEADLINE is {text!r}; give seconds since 1970, as `date +%s` prints them, or unset it"
        ) from None


def under_nsys() -> bool:
    """Return whether Nsight Systems started this process."""
    return "NSYS_PROFILING_SESSION_ID" in os.environ
