"""The program of a worker process: it makes the shards that its parent sends (workers.py).

Standard input: a pickled ShardStore, then pickled shards. Standard output: lines of JSON. Argument:
process id of the parent. The process ends with its parent.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from types import FrameType
from typing import NoReturn

from minitron_mp.artifacts.writer_processes import end_with_parent
from minitron_mp.errors import InputError, os_error_text

STOP_SIGNAL = signal.SIGUSR2
"""Signal with which the parent ends a worker. The worker deletes its unfinished shard and its lock."""


def main() -> None:
    """Make shards until the parent closes the standard input."""
    # Ctrl-C and Slurm signal all processes of a job. The parent decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(STOP_SIGNAL, _leave)
    end_with_parent(int(sys.argv[1]), at_once=True)
    replies = os.dup(1)
    os.dup2(2, 1)  # output of libraries must not mix with the replies

    def reply(**content: object) -> None:
        try:
            os.write(replies, json.dumps(content).encode() + b"\n")
        except BrokenPipeError:  # the parent has ended
            raise SystemExit(1) from None

    store = pickle.load(sys.stdin.buffer)
    while True:
        try:
            shard = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            store.make(shard, lambda documents: reply(documents=documents))
        except OSError as error:
            return reply(error=os_error_text(error))
        except InputError as error:
            return reply(error=str(error))
        reply(done=shard.number)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(1)


if __name__ == "__main__":
    main()
