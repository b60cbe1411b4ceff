"""join_roles: a job whose ranks have roles (teacher, students), each with its own world.

Megatron-Core calls collectives on the default process group, in its optimizer and in its
checkpoints. So each role has its own default group, with rank 0 as the first of the role. A
RoleChannel joins the ranks of all roles. All groups meet in the store of the job, each under its
own prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distributed import launcher
from minitron_mp.distributed.launcher import JobRank, fresh_prefix, local_device
from minitron_mp.distributed.process_groups import init_default_group, within
from minitron_mp.distributed.role_channel import RoleChannel
from minitron_mp.distributed.world import World, build_groups, leave_job
from minitron_mp.errors import InputError, OtherRankError

REPORT_S = 30.0
"""Longest wait for the store of a job that fails."""

REASON_WAIT_S = 3.0
"""How long a rank whose collective broke waits for another rank to report the reason."""


@contextmanager
def join_roles(
    layouts: Mapping[str, tuple[int, ParallelConfig]],
    *,
    seed: int,
    timeout_minutes: float = 30,
    stream_timeout_s: float = 600,
    job: JobRank | None = None,
) -> Iterator[World]:
    """Join the job in the role whose span contains this rank, and yield the world of the role.

    layouts: role -> (number of ranks, layout), in the order of their job ranks.
    stream_timeout_s: timeout of each wait on the channel between roles.
    job: this process in the job. Default: torchrun's.
    InputError when the numbers of ranks do not add up to the job. If a rank fails, all ranks raise
    an error with its reason.
    """
    assert not dist.is_initialized(), "join_roles() creates the default process groups; destroy yours first"
    job = job or launcher.job_rank()
    spans = _spans(layouts, job.size)
    role = next(role for role, span in spans.items() if job.rank in span)
    role_rank = job.rank - spans[role].start
    job = JobRank(fresh_prefix(job.store), job.rank, job.size)
    device = local_device()
    role_store = dist.PrefixStore(f"role/{role}", job.store)
    init_default_group(device, JobRank(role_store, role_rank, len(spans[role])), timeout_minutes)
    channel: RoleChannel | None = None
    is_failed = True
    try:
        channel = _open_channel(role, job, spans, device, timedelta(seconds=stream_timeout_s))
        world = build_groups(layouts[role][1], device, seed, timeout_minutes)
        yield dataclasses.replace(world, role=role, channel=channel)
        channel.barrier("end")  # no rank may destroy groups that another rank still uses
        channel.shutdown()
        is_failed = False
    except Exception as error:
        if channel is None:
            raise
        # A RuntimeError may come from a collective that broke because another rank failed. That
        # rank may not have reported its reason yet.
        text = f"{role} rank {role_rank}: {error}"
        within(REPORT_S, partial(channel.failure, REASON_WAIT_S if isinstance(error, RuntimeError) else 0.0))
        # Before the abort, which breaks the collectives of other ranks. They would report that.
        reason = within(REPORT_S, partial(channel.report_failure, text)) or text
        channel.abort()
        if str(error) in reason:
            raise
        raise (OtherRankError if isinstance(error, InputError) else RuntimeError)(reason) from error
    except BaseException:  # Ctrl-C, or an exit
        if channel is not None:
            channel.abort()
        raise
    finally:
        leave_job(device, is_failed=is_failed)


def _spans(layouts: Mapping[str, tuple[int, ParallelConfig]], job_size: int) -> dict[str, range]:
    """Return {role: its job ranks}. InputError when the sizes do not add up to the job."""
    sizes = {role: ranks for role, (ranks, _) in layouts.items()}
    if sum(sizes.values()) != job_size or min(sizes.values()) < 1:
        parts = " + ".join(f"{ranks} ({role})" for role, ranks in sizes.items())
        raise InputError(
            f"this job has {job_size} ranks, but its roles need {parts}; "
            "change torchrun --nproc-per-node or teacher.ranks"
        )
    spans, first = {}, 0
    for role, size in sizes.items():
        spans[role] = range(first, first + size)
        first += size
    return spans


def _open_channel(
    role: str, job: JobRank, spans: dict[str, range], device: torch.device, timeout: timedelta
) -> RoleChannel:
    store = dist.PrefixStore("control", job.store)
    control = dist.ProcessGroupGloo(store, job.rank, job.size, timeout)
    store = dist.PrefixStore("data", job.store)
    if device.type == "cuda":
        # NCCL's watchdog ends the process at its timeout. The channel's timeout is shorter, and
        # its error names the root cause.
        data = dist.ProcessGroupNCCL(store, job.rank, job.size, 3 * timeout)
    else:
        data = dist.ProcessGroupGloo(store, job.rank, job.size, timeout)
    return RoleChannel(role, job, spans, data, control, timeout, device)
