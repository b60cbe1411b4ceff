"""What test_doctor.py runs on the ranks of a pool."""

from __future__ import annotations

import contextlib
import io
import os
import time
from pathlib import Path
from unittest.mock import patch

import pool
import torch.distributed as dist

from minitron_mp.cluster import file_system
from minitron_mp.cluster.doctor import doctor
from minitron_mp.cluster.file_system import check_file_system
from minitron_mp.cluster.network import RankTable
from minitron_mp.distributed import launcher
from minitron_mp.distributed.launcher import JobRank


def examine(*, words: list[str], skew_s: float = 0.0) -> tuple[int, str]:
    """Run the doctor on this rank with torchrun's variables; return (exit code, output).

    skew_s: seconds by which the last rank's clock is fast.
    """
    store, rank, size = pool.here["place"]
    out = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, RANK=str(rank)))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(patch.object(launcher, "job_rank", lambda: JobRank(store, rank, size)))
        stack.enter_context(pool.without_group())
        code = doctor(
            Path(words[0]) if words else None,
            words[1:],
            clock=lambda: time.time() + skew_s * (rank == size - 1),
        )
    return code, out.getvalue()


def disks_of_their_own(*, folder: str) -> list[str]:
    """Check a relative folder from a different working directory on each rank.

    This emulates nodes with local disks.
    """
    store, rank, size = pool.here["place"]
    own, before = Path(folder) / str(rank), os.getcwd()
    own.mkdir(parents=True)
    os.chdir(own)
    try:
        with patch.object(file_system, "VISIBLE_S", 1.0):
            job = RankTable(dist.PrefixStore(folder, store), rank, size, "host")
            return [f"{result.verdict}: {result.detail}" for result in check_file_system(Path("out"), job)]
    finally:
        os.chdir(before)
