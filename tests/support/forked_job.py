"""Jobs of a few ranks that run the command line, and file systems that fill up.

The ranks are forked from a server that has imported torch and Megatron-Core, with the environment
that torchrun would give them. Each is a real process in its own session, as under torchrun.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import psutil
from pool import PRELOADED

RANKS = 2
LEFT_BEHIND_S = 10.0
"""Time after which no process of a killed rank may be alive."""
RUN_S = 180.0
DISK_BYTES = 64 << 20


def rank_main(rank: int, size: int, port: int, arguments: list[str], log: str) -> None:
    """Main function of a rank: the command line with torchrun's environment."""
    os.setsid()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        PYTHONWARNINGS="ignore",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        COLUMNS="160",
    )
    import torch

    torch.set_num_threads(1)
    from minitron_mp.cli import main

    sys.argv = ["minitron-mp", *arguments]
    main()


class Job:
    """A running job."""

    def __init__(self, arguments: list[str], log: Path, ranks: int = RANKS):
        self.log = log
        self.started = time.time()
        log.write_text("")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        forkserver.set_forkserver_preload(PRELOADED)
        self.ranks = [
            context.Process(target=rank_main, args=(rank, ranks, port, arguments, str(log)))
            for rank in range(ranks)
        ]
        for rank in self.ranks:
            rank.start()
        self.hangs = False
        self.sessions = [rank.pid for rank in self.ranks]

    @property
    def running(self) -> bool:
        return all(rank.is_alive() for rank in self.ranks)

    def wait(self, condition: Callable[[], bool], timeout_s: float = RUN_S) -> bool:
        """Wait until the condition is true. Return False if the job ends before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self.running or time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def end(self) -> int:
        """Wait for the ranks as torchrun does: after the first failure it stops all others."""
        deadline = time.monotonic() + RUN_S
        while self.running and time.monotonic() < deadline:
            time.sleep(0.01)
        self.hangs = self.running
        if self.hangs:
            self._dump_stacks()
        codes = [rank.exitcode for rank in self.ranks]
        if any(codes) or self.hangs:
            for number, wait_s in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0)):
                for rank in self.ranks:
                    if rank.is_alive():
                        os.kill(rank.pid, number)
                for rank in self.ranks:
                    rank.join(wait_s)
        for rank in self.ranks:
            rank.join(max(0.1, deadline - time.monotonic()))
        return next((code for code in codes if code), 0)

    def kill(self) -> list[int | None]:
        """Kill every process of the job at once. Return the exit codes of the ranks."""
        for session in self.sessions:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.killpg(session, signal.SIGKILL)
        for process in self.processes():  # children in process groups of their own
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for rank in self.ranks:
            rank.join(5)
        return [rank.exitcode for rank in self.ranks]

    def _dump_stacks(self) -> None:
        """Make each rank write the stack of each of its threads to the log."""
        for rank in self.ranks:
            os.kill(rank.pid, signal.SIGUSR1)
        time.sleep(1)

    def processes(self) -> list[psutil.Process]:
        """Return all living processes of the sessions of the ranks."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) in self.sessions and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def left_behind(self) -> list[str]:
        """Return the processes that are alive LEFT_BEHIND_S after the ranks have ended."""
        deadline = time.monotonic() + LEFT_BEHIND_S
        while (found := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        names = []
        for process in found:
            with contextlib.suppress(psutil.Error):
                names.append(" ".join(process.cmdline())[:100])
                process.kill()
        return names


@contextlib.contextmanager
def tmpfs(folder: Path) -> Iterator[bool]:
    """Mount a small file system at the folder. Yield False if this user may not do that."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=False)


@contextlib.contextmanager
def filled(folder: Path, free_bytes: int) -> Iterator[None]:
    """Fill a file system up to a number of free bytes, in this context."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        room = max(0, shutil.disk_usage(folder).free - free_bytes)
        with contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(1, room))
    try:
        yield
    finally:
        filler.unlink()
