"""Start and end of a job, and its process groups. The only user of parallel_state and of the launch environment.

A job has one world, or one for each role (teacher, students). Megatron-Core calls collectives on the default process group, in
its optimizer and all over its checkpoints, so every role has a default group of its own; rank 0 is the first of the role. The
ranks of all roles are joined by a Bridge. Everything meets in the store of the job, under a prefix of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distributed import launcher
from minitron_mp.distributed.launcher import JobRank, fresh_prefix, local_device
from minitron_mp.distributed.role_channel import RoleChannel
from minitron_mp.distributed.world import World, build_groups, init_default_group, leave_groups
from minitron_mp.errors import InputError


@contextmanager
def join_roles(
    layouts: Mapping[str, tuple[int, ParallelConfig]],
    *,
    seed: int,
    timeout_minutes: float = 30,
    stream_timeout_s: float = 600,
    place: JobRank | None = None,
) -> Iterator[World]:
    """Join the job as the role whose span holds this rank; yields the world of the role, with the bridge to the others.

    layouts: role -> (ranks, layout), in the order of their job ranks. place: of this process; default: torchrun's. InputError when
    the ranks do not add up. When ranks fail, each raises the reason that the first of them gave.
    """
    assert not dist.is_initialized(), "roles() makes the default process groups; leave the one that is there"
    place = place or launcher.job_rank()
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
    place = JobRank(fresh_prefix(place.store), place.rank, place.size)
    device, bridge = local_device(), None
    init_default_group(
        device,
        JobRank(dist.PrefixStore(f"role/{role}", place.store), place.rank - spans[role].start, sizes[role]),
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
        bridge = RoleChannel(role, place, spans, data, control, timeout, device)
        yield dataclasses.replace(build_groups(layouts[role][1], device, seed), role=role, channel=bridge)
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
