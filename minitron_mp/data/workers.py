"""Worker processes that tokenize shards, each one shard at a time.

They are started as new programs, not forked, because the ranks of a job have threads and a GPU. The
parent sends the store and then shards to the standard input of a worker (worker_process.py), which
answers with lines of JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import selectors
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from minitron_mp.console import say
from minitron_mp.data.documents import BATCH_CHARACTERS
from minitron_mp.data.shards import Shard, ShardStore
from minitron_mp.data.tokenize import Progress
from minitron_mp.data.worker_process import STOP_SIGNAL
from minitron_mp.distributed.job import num_cpus, worker_environment
from minitron_mp.errors import InputError

CHARACTERS_PER_THREAD = 1 << 19
"""Characters of a batch for each thread of a worker. Less memory than one large batch needs."""

REPLY_BYTES = 1 << 16

STOP_S = 10.0
"""Time in which a worker deletes its unfinished shard and ends."""


def make_shards(
    store: ShardStore, shards: Sequence[Shard], num_workers: int | None, progress: Progress | None = None
) -> None:
    """Make shards with worker processes. One worker is this process.

    num_workers: default: one for each CPU of this process, but at most one for each shard. After an
    error or an interruption the workers end, and finished shards are kept.
    """
    num_workers = min(num_workers or num_cpus(), len(shards))
    if num_workers <= 1:
        for shard in shards:
            store.make(shard, progress)
        return
    num_threads = max(1, num_cpus() // num_workers)
    characters = min(BATCH_CHARACTERS, CHARACTERS_PER_THREAD * num_threads)
    content = pickle.dumps(replace(store, job=replace(store.job, batch_characters=characters)))
    say(f"workers: {num_workers}, threads of each: {num_threads}, shards to make: {len(shards)}")
    workers: list[_Worker] = []
    try:
        remaining = deque(shards)
        for _ in range(num_workers):
            workers.append(_Worker(content, num_threads))
            workers[-1].give(remaining.popleft())
        _serve(workers, remaining, progress)
    finally:
        for worker in workers:
            worker.process.send_signal(STOP_SIGNAL)
        for worker in workers:
            worker.wait()


def _serve(workers: list[_Worker], remaining: deque[Shard], progress: Progress | None) -> None:
    """Give shards to workers until all are done."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.replies, selectors.EVENT_READ, worker)
        while selector.get_map():
            for key, _ in selector.select():
                worker = key.data
                for reply in worker.read():
                    if "documents" in reply and progress:
                        progress(reply["documents"])
                    if "done" not in reply:
                        continue
                    if remaining:
                        worker.give(remaining.popleft())
                    else:
                        selector.unregister(worker.replies)


class _Worker:
    """A worker process, and the shard that it makes."""

    def __init__(self, store: bytes, num_threads: int):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minitron_mp.data.worker_process", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=worker_environment(num_threads),
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests = self.process.stdin
        self.replies = self.process.stdout.fileno()
        self.shard: Shard | None = None
        self._rest = b""
        self._send(store)

    def give(self, shard: Shard) -> None:
        """Let the worker make a shard."""
        self.shard = shard
        self._send(pickle.dumps(shard))

    def read(self) -> list[dict[str, int]]:
        """Return the replies that have arrived, after a wait for the first part.

        InputError if the worker reports an error, or has ended.
        """
        part = os.read(self.replies, REPLY_BYTES)
        if not part:
            raise InputError(self._end())
        *lines, self._rest = (self._rest + part).split(b"\n")
        replies = [json.loads(line) for line in lines]
        for reply in replies:
            if "error" in reply:
                raise InputError(reply["error"])
        return replies

    def wait(self) -> None:
        """Wait until the process has ended after STOP_SIGNAL, and kill it if it does not end."""
        with suppress(OSError):  # the pipe is broken
            self.requests.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _send(self, content: bytes) -> None:
        try:
            self.requests.write(content)
            self.requests.flush()
        except BrokenPipeError:
            raise InputError(self._end()) from None

    def _end(self) -> str:
        """Return a sentence about a worker that has ended."""
        code = self.process.wait()
        shard = "at its start" if self.shard is None else f"in shard {self.shard.name}"
        if code == -9:
            return (
                f"a worker process was killed {shard} (signal 9), which the system does if memory is short; "
                "lower data.workers, and run the same command again: finished shards are kept"
            )
        return (
            f"a worker process ended with exit code {code} {shard}; see its output above, and run the same "
            "command again: finished shards are kept"
        )
