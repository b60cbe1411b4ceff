"""The helper processes of checkpoint writers: they end with their parent, and need no TMPDIR."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from tiny import environment

START = """
import json, multiprocessing, os, time
from minitron_mp.artifacts.writer_processes import forked_writers

def inner(pids):
    pids.put(os.getpid())
    time.sleep(600)

def outer(pids):  # as Megatron-Core: a writer that forks writers
    child = multiprocessing.get_context("fork").Process(target=inner, args=(pids,))
    child.start()
    child.join()

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    pids = context.Queue()
    with forked_writers():
        writer = context.Process(target=outer, args=(pids,))
        writer.start()
    children = [child.pid for child in multiprocessing.active_children()]
    print(json.dumps([*children, pids.get()]), flush=True)
    time.sleep(600)
"""


def test_helpers_of_a_killed_rank_end(tmp_path):
    """A manager, a writer and the writer's writer, with a TMPDIR that is too long for a socket."""
    (tmp_path / "rank.py").write_text(START)
    folder = Path(tempfile.gettempdir()) / f"minitron-{os.getpid()}" / ("x" * 100)
    folder.mkdir(parents=True)
    try:
        rank = subprocess.Popen(
            [sys.executable, tmp_path / "rank.py"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment(), "TMPDIR": str(folder)},
        )
        line = rank.stdout.readline()
        assert line, rank.stderr.read()
        helpers = [psutil.Process(pid) for pid in json.loads(line)]
        assert len(helpers) == 3
        assert any(folder.iterdir()) is False
        assert all(helper.is_running() for helper in helpers)
        rank.send_signal(signal.SIGKILL)
        rank.wait()
        deadline = time.monotonic() + 10
        while any(map(is_alive, helpers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [helper for helper in helpers if is_alive(helper)]
    finally:
        folder.rmdir()
        folder.parent.rmdir()


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_death_of_the_manager_is_reported(ranks, tmp_path):
    (error,) = ranks(1, "writer_workers.save_without_manager", folder=str(tmp_path / "model"))
    assert (
        f"{tmp_path / 'model'} could not be written: the helper process of the checkpoint writers has"
        in error
    )
    assert "run the same command again" in error
    assert list(tmp_path.iterdir()) == []
