"""Kill a training run in the middle."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable

import psutil
from forked_job import Job
from tiny import CHECKPOINT_INTERVAL, Run


def start_and_kill(run: Run, *overrides: str, ranks: int = 1) -> int:
    """Start distill on forked ranks, and kill them all after the first checkpoint.

    Returns the number of logged steps.
    """
    (run.output / "metrics.jsonl").unlink()
    job = Job(["distill", str(run.recipe), *overrides], run.recipe.with_name("killed.log"), ranks)
    try:
        logged = wait_past_a_checkpoint(run, lambda: job.running)
    finally:
        codes = job.kill()
    assert codes == [-signal.SIGKILL] * ranks, f"it had ended before the kill: {job.log.read_text()[-1500:]}"
    return logged


def wait_past_a_checkpoint(run: Run, running: Callable[[], bool]) -> int:
    """Steps that the run has logged by then."""
    log, deadline, logged = run.output / "metrics.jsonl", time.monotonic() + 120, 0
    while logged < CHECKPOINT_INTERVAL + 2 and running() and time.monotonic() < deadline:
        time.sleep(0.002)
        logged = log.read_bytes().count(b"\n") if log.exists() else 0
    return logged


def kill_tree(process: subprocess.Popen) -> None:
    """Kill all processes.

    torchrun's ranks have their own sessions, and checkpoint writers outlive ranks.
    """
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
