"""Start and end of a job, and its process groups. The only user of parallel_state and of the launch environment.

A job has one world, or one for each role (teacher, students). Megatron-Core calls collectives on the default process group, in
its optimizer and all over its checkpoints, so every role has a default group of its own; rank 0 is the first of the role. The
ranks of all roles are joined by a Bridge. Everything meets in the store of the job, under a prefix of its own.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from minitron_mp.errors import InputError


@dataclass(frozen=True)
class JobRank:
    """Where a process is in the job."""

    store: Any
    rank: int
    size: int


def fresh_job_rank() -> JobRank:
    """This process in the launcher's job, before any group is made; the store, with keys of its own, joins the ranks already."""
    here = job_rank()
    return JobRank(fresh_prefix(here.store), here.rank, here.size)


def compute_device() -> torch.device:
    """What this rank computes on."""
    return local_device()


def num_job_ranks() -> int:
    """Ranks of the job, before it is joined."""
    return dist.get_world_size() if dist.is_initialized() else job_rank().size


def ranks_per_node() -> int:
    """Of the launcher; all ranks of the job where it does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_job_ranks()))


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


def job_deadline() -> float | None:
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


_joined = itertools.count()
"""Worlds that this process has joined, the same number on every rank: each has fresh keys in the store."""


def fresh_prefix(store: Any) -> Any:
    return dist.PrefixStore(f"world{next(_joined)}", store)


@functools.cache
def job_rank() -> JobRank:
    """torchrun's; alone without it. Once a process: the first call may have made the store that the others connect to."""
    if "RANK" not in os.environ:
        return JobRank(dist.HashStore(), 0, 1)
    return JobRank(*next(iter(dist.rendezvous("env://"))))


def local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # More ranks than GPUs: NCCL refuses two on one, unless each has a NCCL_HOSTID of its own, as the tests do it.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
