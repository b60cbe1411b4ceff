"""A pool of gloo ranks that live for many tests.

Ranks are forked from a server that has imported torch and Megatron-Core once.

A test sends the name of a module-level function ("module.function", see conftest.py) with keyword
arguments to all ranks, and gets the list of return values by rank. An exception on any rank is
raised as RankError with that rank's traceback and coordinates. A pool is killed after a failure,
because its ranks may wait in different collectives, and the next call starts a new one. Every rank
leads a process group, so that Megatron-Core's checkpoint writers and manager die with it.
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
"""For one collective. It is above the slowest one on a loaded machine."""
CALL_TIMEOUT_S = 300.0
STARTS = 3
GRACE_S = 3.0
"""Time after one rank's failure in which the other ranks may report theirs."""

here: dict[str, Any] = {}
"""State of a rank. "coordinates": set by worker functions; "place": (store, rank, size)."""


class RankError(AssertionError):
    """The errors of all ranks that failed."""


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}

PRELOADED = [
    "minitron_mp.workflow.run",
    "minitron_mp.workflow.stages.depth.trials",
    "minitron_mp.workflow.stages.distill.student",
    "minitron_mp.workflow.stages.evaluate.models",
    "minitron_mp.artifacts.hf_folder",
    "minitron_mp.workflow.stages.search.candidates",
    "minitron_mp.pruning.importance",
    "transformers.models.auto.tokenization_auto",
]
"""The modules that a stage imports when it runs; the ranks are forked with them."""


class Pool:
    """`size` ranks with one default process group, started by the first run().

    environment: variables that are read at import. Ranks with an environment are spawned, not
    forked, and import everything themselves.
    """

    def __init__(self, size: int, environment: Mapping[str, str] | None = None):
        self.size, self.environment, self.ranks = size, environment, []

    def run(
        self, function: str, *, timeout_s: float = CALL_TIMEOUT_S, grace_s: float = GRACE_S, **kwargs: Any
    ) -> list[Any]:
        """Call function(**kwargs) on every rank; return the values by rank."""
        if not self.ranks:
            self._start()
        request = pickle.dumps((function, kwargs))
        deadline = time.monotonic() + timeout_s
        for rank in self.ranks:
            with contextlib.suppress(BrokenPipeError):  # the rank has died; reading from it fails below
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
        timed_out = [rank for rank in self.ranks if rank.number not in values and rank.number not in errors]
        if errors or timed_out:
            for rank in timed_out:
                rank.dump_stacks()
            text = [f"rank {number} of {self.size}: {error}" for number, error in sorted(errors.items())]
            text += [
                f"rank {rank.number} of {self.size} has not answered"
                + ("" if errors else f" in {timeout_s:.0f} s")
                for rank in timed_out
            ]
            text += [
                f"last output of rank {rank.number}:\n{rank.output()}" for rank in self.ranks if rank.output()
            ]
            self.kill()
            raise RankError(f"{function} failed\n" + "\n".join(text))
        return [values[number] for number in range(self.size)]

    def close(self) -> None:
        """Close the pipes, wait for the ranks to exit, and kill those that do not."""
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
        """Start the ranks; retry, because gloo's first connections can break under load."""
        for _ in range(STARTS):
            self.ranks = [_Rank(number, self.size, self.environment) for number in range(self.size)]
            ok, port_or_error = self.ranks[0].receive()
            error = "" if ok else port_or_error
            if not error:
                for rank in self.ranks:
                    rank.pipe.send_bytes(pickle.dumps(port_or_error))
                waiting = {rank.pipe: rank for rank in self.ranks}
                while waiting and not error:
                    for pipe in wait(list(waiting)):
                        ready, answer = waiting.pop(pipe).receive()
                        if not ready:
                            error = answer
            if not error:
                return
            output = "\n".join(rank.output(800) for rank in self.ranks if rank.output())
            self.kill()
        raise RankError(f"{self.size} ranks do not start, tried {STARTS} times: {error}\n{output}")


class _Rank:
    """The test session's side of one rank."""

    def __init__(self, number: int, size: int, environment: Mapping[str, str] | None):
        self.number = number
        self.pipe, rank_pipe = Pipe()
        self.log = tempfile.NamedTemporaryFile("r", errors="replace")  # noqa: SIM115 (closed in kill)
        with patch.dict(os.environ, {**ENVIRONMENT, **(environment or {})}):
            context = multiprocessing.get_context("forkserver" if environment is None else "spawn")
            forkserver.set_forkserver_preload(PRELOADED)
            self.process = context.Process(target=live, args=(rank_pipe, number, size, self.log.name))
            self.process.start()
        rank_pipe.close()

    def receive(self) -> tuple[bool, Any]:
        """Return (True, value) or (False, error text)."""
        try:
            return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join()
            return False, f"died with exit code {self.process.exitcode}"

    def output(self, characters: int = 3000) -> str:
        self.log.seek(0)
        return self.log.read()[-characters:]

    def dump_stacks(self) -> None:
        """Make the rank write the stack of each thread to its output."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.1)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # the group has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # if it does not lead its group yet
        self.process.join()
        self.pipe.close()
        self.log.close()


def live(pipe: Connection, rank: int, size: int, log: str) -> None:
    """Main function of a rank."""
    os.setsid()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    # A forked rank has 440,000 objects from imports. Collecting them takes 0.2 s and copies their
    # pages.
    gc.freeze()
    serve(pipe, rank, size)
    for child in multiprocessing.active_children():
        child.terminate()
    # Skip the interpreter's shutdown: gloo's threads and Megatron-Core's manager can block it.
    os._exit(0)


def serve(pipe: Connection, rank: int, size: int) -> None:
    """Join the group, then run requests until the session closes its end of the pipe."""
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
        # A model and its groups are cyclic garbage. The thread of each gloo group wakes up 100
        # times a second, so uncollected groups slow all ranks down.
        del answer
        gc.collect()


def _join(pipe: Connection, rank: int, size: int) -> None:
    """Make the default gloo group over a store at a free port of rank 0."""
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
    """In a rank: destroy the default group for code that makes one, and make it again.

    After an error it is not made again, because other ranks may be dead.
    """
    from datetime import timedelta

    import torch.distributed as dist

    dist.destroy_process_group()
    yield
    store, rank, size = here["place"]
    here["count"] = here.get("count", 0) + 1
    options = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=GROUP_TIMEOUT_S)}
    dist.init_process_group("gloo", store=dist.PrefixStore(f"pool{here['count']}", store), **options)
