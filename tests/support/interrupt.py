"""Kill a training run in the middle."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import psutil
from tiny import CHECKPOINT_INTERVAL, Run, command, environment


def start_and_kill(run: Run, *overrides: str, ranks: int = 1) -> int:
    """Start distill in a process, or under torchrun, and kill it after its first checkpoint.

    Returns the number of logged steps.
    """
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    (run.output / "metrics.jsonl").unlink()
    process = subprocess.Popen(
        command("distill", run.recipe, *overrides, ranks=ranks),
        env=environment(),
        start_new_session=True,
        **quiet,
    )
    try:
        logged = wait_past_a_checkpoint(run, process)
    finally:
        kill_tree(process)
    assert process.returncode == -signal.SIGKILL, "it was done, or had failed, before the kill"
    return logged


def wait_past_a_checkpoint(run: Run, process: subprocess.Popen) -> int:
    """Steps that the run has logged by then."""
    log, deadline, logged = run.output / "metrics.jsonl", time.monotonic() + 120, 0
    while logged < CHECKPOINT_INTERVAL + 2 and process.poll() is None and time.monotonic() < deadline:
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
