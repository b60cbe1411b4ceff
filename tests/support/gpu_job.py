"""A test file of tests/gpu as a torchrun job of two ranks, on one GPU or on two.

A file calls run_ranks(__file__, words...) in its test, and separate_hosts() in its `__main__`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
FOLDERS = (TESTS / "support", TESTS / "ranks", TESTS.parent)


def line_of(file: str | Path, *words: str | Path, ranks: int = 2) -> list[str]:
    """Return the command. --local-addr: ranks find each other where the host's name has no address."""
    local = ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks))
    return [sys.executable, "-m", "torch.distributed.run", *local, str(file), *map(str, words)]


def environment_of() -> dict[str, str]:
    """Return the environment of the ranks.

    The folders of PYTHONPATH stay: on some machines they have the packages. NCCL and gloo use the
    loopback device, because all ranks are on this machine.
    """
    paths = [*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "NCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "COLUMNS": "160",
    }


def run_ranks(file: str | Path, *words: str | Path, ranks: int = 2, timeout_s: float = 400) -> str:
    """Run a file on ranks of this machine; return what they printed. An error fails the test."""
    done = subprocess.run(
        line_of(file, *words, ranks=ranks),
        env=environment_of(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def separate_hosts() -> None:
    """Call it on each rank before NCCL starts. NCCL refuses two ranks of one host on one GPU."""
    import torch

    if 0 < torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        os.environ["NCCL_HOSTID"] = f"rank{os.environ['RANK']}"
