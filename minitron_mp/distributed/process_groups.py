"""Start, use and end of torch's process groups.

Values in host memory (errors, free space, stop requests) are reduced over host_group(), never over
a group of NCCL, which accepts only tensors of the GPU.

On GPUs the default group is a plain "nccl" group without a bound device, as in Megatron-LM and
Megatron-Bridge. Megatron-Core makes about 1000 groups for 256 ranks, and each of them inherits the
backends of the default group. With "cpu:gloo,cuda:nccl" each would connect all its ranks a second
time, over gloo. With a bound device each would be a collective split of the default group, also on
the ranks that are not in it. Without both, a group connects at its first collective, and most
groups never do. connect() connects those that this library uses.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from minitron_mp.distributed.job import raise_open_file_limit
from minitron_mp.distributed.launcher import JobRank

T = TypeVar("T")

CPU = torch.device("cpu")

ABORT_S = 20.0
"""Longest wait for the abort of groups. NCCL's abort may wait for other ranks of the node."""

_host_groups: list[tuple[dist.ProcessGroup, dist.ProcessGroup]] = []
"""At most one entry: a default group, and the group of gloo beside it."""


def init_default_group(device: torch.device, job: JobRank, timeout_minutes: float) -> None:
    """Make the default process group from a rank, a world size and a store."""
    raise_open_file_limit()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=job.store,
        rank=job.rank,
        world_size=job.size,
        timeout=timedelta(minutes=timeout_minutes),
    )


def host_group() -> dist.ProcessGroup:
    """Return a group of all ranks of this world for tensors in host memory.

    It is the default group if that has a backend for them. Else it is a gloo group, which the first
    call makes. Reached by all ranks.
    """
    default = dist.distributed_c10d._get_default_group()
    if CPU in default._device_types:
        return default
    if not _host_groups or _host_groups[0][0] is not default:
        timeout = timeout_of(default, default._device_types[0])
        _host_groups[:] = [(default, dist.new_group(backend="gloo", timeout=timeout))]
    return _host_groups[0][1]


def host_barrier() -> None:
    """Wait on the host for all ranks of this world. A barrier of NCCL would wait for the GPU."""
    dist.barrier(host_group())


def timeout_of(group: dist.ProcessGroup, device: torch.device = CPU) -> timedelta:
    """Return the timeout of a group's collectives on a device."""
    timeout: timedelta = group._get_backend(device).options._timeout
    return timeout


def connect(groups: Sequence[dist.ProcessGroup], device: torch.device) -> None:
    """Connect the ranks of each group, then wait for all ranks of this world; reached by all ranks.

    A group of NCCL connects at its first collective, for which all its ranks are needed. Without
    this function the first transfer between two pipeline stages could wait for the other stages.

    gloo connects when a group is made, which returns on each rank when that rank has connected. A
    rank that fails or ends soon after would close its sockets while other ranks still connect.
    Those would report that, not the cause.
    """
    if device.type == "cuda":
        for group in [*dict.fromkeys(groups), dist.group.WORLD]:
            if group.size() > 1:
                dist.all_reduce(torch.zeros(1, device=device), group=group)
        torch.cuda.synchronize(device)
    host_barrier()


def all_groups() -> list[dist.ProcessGroup]:
    """Return all groups of this process that exist."""
    return list(dist.distributed_c10d._world.pg_names)


def end_default_group(device: torch.device, *, is_failed: bool) -> None:
    """Destroy all groups of this process, if there are any. Abort them if this rank has failed.

    destroy_process_group() of NCCL waits for collectives in progress, in which other ranks wait for
    this one. With gloo it closes the connections, and the other ranks fail at once. torch sorts the
    groups by name, so all ranks destroy their common groups in the same order.
    """
    if not dist.is_initialized():
        return
    if is_failed and device.type == "cuda":
        abort_groups(device)
    else:
        dist.destroy_process_group()
    _forget_host_group()


def end_groups(groups: Sequence[dist.ProcessGroup], device: torch.device, *, is_failed: bool) -> None:
    """Destroy some groups in the order of end_default_group(). Abort them if this rank has failed.

    A group of NCCL may wait until its other ranks destroy it as well, so the order must be the same
    on all ranks.
    """
    in_order = sorted(groups, key=lambda group: group.group_name, reverse=True)
    if is_failed and device.type == "cuda":

        def abort() -> None:
            for group in in_order:
                with suppress(Exception):  # already destroyed
                    dist.distributed_c10d._abort_process_group(group)

        _end_in_time(abort, device)
    else:
        for group in in_order:
            with suppress(ValueError):  # already destroyed
                dist.destroy_process_group(group)
    _forget_host_group()


def abort_groups(device: torch.device, others: Sequence[dist.ProcessGroup] = ()) -> None:
    """Abort all groups of this process on a GPU, with their transfers in progress.

    others: groups that torch does not know.
    """

    def abort() -> None:
        for group in others:
            with suppress(Exception):
                group.abort()
        if dist.is_initialized():
            dist.distributed_c10d._abort_process_group()

    _end_in_time(abort, device)


def shut_down(group: dist.ProcessGroup, device: torch.device) -> None:
    """Shut down a group that torch does not know; reached by all its ranks."""
    if device.type == "cuda":
        _end_in_time(group.shutdown, device)
    else:
        group.shutdown()


def _end_in_time(end: Callable[[], object], device: torch.device) -> None:
    """Call end() on a thread, and return after at most ABORT_S.

    NCCL closes the connections to ranks of the same node only together with them, in abort and in
    shutdown. If that does not end in time, the process later ends without destructors, which would
    wait again, and with exit code 1. torchrun then ends the other ranks.
    """

    def run() -> bool:
        torch.cuda.set_device(device)  # a new thread starts with the first GPU
        with suppress(Exception):
            end()
        return True

    if not within(ABORT_S, run):
        atexit.register(_exit_without_destructors)


def within(seconds: float, action: Callable[[], T]) -> T | None:
    """Return the result of an action; None if it does not end in time.

    The action runs on a thread, because a store whose process is suspended never answers.
    """
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(action()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _exit_without_destructors() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _forget_host_group() -> None:
    """Drop the reference to a host group that is destroyed."""
    if _host_groups and _host_groups[0][1] not in all_groups():
        _host_groups.clear()
