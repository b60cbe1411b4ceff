"""What test_timeout.py runs on two ranks of a pool of its own."""

from __future__ import annotations

import contextlib
import time
from unittest.mock import patch

import pool
import torch
import torch.distributed as dist

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distributed import launcher
from minitron_mp.distributed.launcher import JobRank
from minitron_mp.distributed.world import join_world


def hang(*, timeout_minutes: float) -> float:
    """Return the seconds until a collective with a rank that does not come fails; 0 on that rank."""
    seconds = 0.0
    with contextlib.suppress(RuntimeError), contextlib.ExitStack() as stack:
        stack.enter_context(pool.without_group())
        stack.enter_context(patch.object(launcher, "job_rank", lambda: JobRank(*pool.here["place"])))
        world = stack.enter_context(join_world(ParallelConfig(tp=2), seed=1, timeout_minutes=timeout_minutes))
        start = time.monotonic()
        if world.rank == 1:
            time.sleep(3 * timeout_minutes * 60)
            return 0.0
        try:
            dist.all_reduce(torch.zeros(1), group=world.groups.tp)
        except RuntimeError:
            seconds = time.monotonic() - start
    return seconds
