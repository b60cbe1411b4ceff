"""A pool of gloo ranks that outlives single tests. They are forked from a server that has imported torch and Megatron-Core once.

A test sends a function by name ("module.function", module-level, in tests/) with keyword arguments to all ranks and gets the
list of return values, by rank. An exception on any rank comes back as RankError with that rank's traceback and coordinates.
A pool that failed is not used again: its ranks may wait in different collectives. So it is killed, and the next call starts
a new one. Every rank leads a process group of its own: Megatron-Core's checkpoint writers and manager die with it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any
from unittest.mock import patch

GROUP_TIMEOUT_S = 120
"""Of one collective: above the slowest one on a loaded machine, below the patience of whoever waits for the suite."""
CALL_TIMEOUT_S = 300.0
STARTS = 3
GRACE_S = 3.0
"""After one rank's failure the others get so long to report theirs."""

here: dict[str, Any] = {}
"""In a rank: "coordinates", set by the functions that know them; "place": (store, rank, size)."""


class RankError(AssertionError):
    """What went wrong, for every rank on which something did."""


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}

PRELOADED = [
    "minitron_mp.workflow.run",
    "minitron_mp.workflow.stages.depth.trials",
    "minitron_mp.workflow.stages.distill.student",
    "minitron_mp.workflow.stages.evaluate.models",
    "minitron_mp.workflow.stages.export.hf_folder",
    "minitron_mp.workflow.stages.search.candidates",
    "minitron_mp.pruning.importance",
]
"""The modules that a stage imports when it runs; the ranks are forked with them."""


class Pool:
    """`size` ranks with one default process group, started at the first run().

    environment: for what reads it at its import; such ranks are not forked, they import everything themselves.
    """

    def __init__(self, size: int, environment: Mapping[str, str] | None = None):
        self.size, self.environment, self.ranks = size, environment, []

    def run(
        self, function: str, *, timeout_s: float = CALL_TIMEOUT_S, grace_s: float = GRACE_S, **kwargs: Any
    ) -> list[Any]:
        """function(**kwargs) on every rank -> return values by rank."""
        if not self.ranks:
            self._start()
        request, deadline = pickle.dumps((function, kwargs)), time.monotonic() + timeout_s
        for rank in self.ranks:
            with contextlib.suppress(BrokenPipeError):  # a rank that died since shows as an end of file below
                rank.pipe.send_bytes(request)
        values: dict[int, Any] = {}
        errors: dict[int, str] = {}
        while len(values) + len(errors) < self.size and time.monotonic() < deadline:
            waiting = {
                rank.pipe: rank
                for rank in self.ranks
                if rank.number not in values and rank.number not in errors
            }
            for pipe in wait(list(waiting), max(0.0, deadline - time.monotonic())):
                rank = waiting[pipe]
                ok, value = rank.receive()
                (values if ok else errors)[rank.number] = value
                if not ok:
                    deadline = min(deadline, time.monotonic() + grace_s)
        silent = [rank for rank in self.ranks if rank.number not in values and rank.number not in errors]
        if errors or silent:
            for rank in silent:
                rank.tell_where()
            text = [f"rank {number} of {self.size}: {error}" for number, error in sorted(errors.items())]
            text += [
                f"rank {rank.number} of {self.size} has not answered"
                + ("" if errors else f" in {timeout_s:.0f} s")
                for rank in silent
            ]
            text += [
                f"last output of rank {rank.number}:\n{rank.output()}" for rank in self.ranks if rank.output()
            ]
            self.kill()
            raise RankError(f"{function} failed\n" + "\n".join(text))
        return [values[number] for number in range(self.size)]

    def close(self) -> None:
        """Let the ranks end by themselves, then make sure."""
        for rank in self.ranks:
            rank.pipe.close()
        for rank in self.ranks:
            rank.process.join(10)
        self.kill()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
        self.ranks = []

    def _start(self) -> None:
        """Start the ranks, and again when they do not find each other: on a loaded machine gloo's first connections break now and then."""
        for _ in range(STARTS):
            self.ranks = [_Rank(number, self.size, self.environment) for number in range(self.size)]
            ok, told = self.ranks[0].receive()
            if ok:
                for rank in self.ranks:
                    rank.pipe.send_bytes(pickle.dumps(told))
                waiting = {rank.pipe: rank for rank in self.ranks}
                while ok and waiting:
                    for pipe in wait(list(waiting)):
                        ready, answer = waiting.pop(pipe).receive()
                        ok, told = ok and ready, told if ready else answer
            if ok:
                return
            output = "\n".join(rank.output(800) for rank in self.ranks if rank.output())
            self.kill()
        raise RankError(f"the pool of {self.size} does not start, {STARTS} times: {told}\n{output}")


class _Rank:
    """One worker process as the test session sees it."""

    def __init__(self, number: int, size: int, environment: Mapping[str, str] | None):
        self.number = number
        self.pipe, theirs = Pipe()
        self.log = tempfile.NamedTemporaryFile("r", errors="replace")  # noqa: SIM115 (closed in kill)
        with patch.dict(os.environ, {**ENVIRONMENT, **(environment or {})}):
            context = multiprocessing.get_context("forkserver" if environment is None else "spawn")
            forkserver.set_forkserver_preload(PRELOADED)
            self.process = context.Process(target=live, args=(theirs, number, size, self.log.name))
            self.process.start()
        theirs.close()

    def receive(self) -> tuple[bool, Any]:
        """(whether it went well, value or text)."""
        try:
            return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join()
            return False, f"died with exit code {self.process.exitcode}"

    def output(self, characters: int = 3000) -> str:
        self.log.seek(0)
        return self.log.read()[-characters:]

    def tell_where(self) -> None:
        """Have the stacks of its threads written to its output."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.1)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # the group is gone already
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # where it does not lead its group yet
        self.process.join()
        self.pipe.close()
        self.log.close()


def live(pipe: Connection, rank: int, size: int, log: str) -> None:
    """A rank from its start to its end."""
    os.setsid()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    gc.freeze()  # what is imported, of a forked rank 440,000 objects: to look through them takes 0.2 s each time, and copies their pages
    serve(pipe, rank, size)
    for child in multiprocessing.active_children():
        child.terminate()
    # No interpreter shutdown: gloo's threads and Megatron-Core's manager can make it wait, and nothing is left to write.
    os._exit(0)


def serve(pipe: Connection, rank: int, size: int) -> None:
    """Join the group, then answer requests until the session closes its end of the pipe."""
    _join(pipe, rank, size)
    pipe.send_bytes(pickle.dumps((True, "ready")))
    while True:
        try:
            function, kwargs = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        here["coordinates"] = ""
        try:
            module, name = function.rsplit(".", 1)
            answer = (True, getattr(importlib.import_module(module), name)(**kwargs))
        except BaseException:
            answer = (False, f"{here['coordinates']}\n{traceback.format_exc()}")
        pipe.send_bytes(pickle.dumps(answer))
        # A model and its groups are garbage in cycles. A gloo group keeps a thread that wakes up 100 times a second, so many
        # that wait for the collector slow all ranks down.
        del answer
        gc.collect()


def _join(pipe: Connection, rank: int, size: int) -> None:
    """Default gloo group over a store at a port that rank 0 finds free."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = timedelta(seconds=GROUP_TIMEOUT_S)
    store = None
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        pipe.send_bytes(pickle.dumps((True, store.port)))
    port = pickle.loads(pipe.recv_bytes())
    store = store or dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    here["place"] = store, rank, size
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("pool", store), rank=rank, world_size=size, timeout=timeout
    )


@contextlib.contextmanager
def without_group() -> Iterator[None]:
    """In a rank: leave the default group for what makes its own, and make it again; not after an error, when others may be dead."""
    from datetime import timedelta

    import torch.distributed as dist

    dist.destroy_process_group()
    yield
    store, rank, size = here["place"]
    here["count"] = here.get("count", 0) + 1
    options = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=GROUP_TIMEOUT_S)}
    dist.init_process_group("gloo", store=dist.PrefixStore(f"pool{here['count']}", store), **options)
