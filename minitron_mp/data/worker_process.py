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

from minitron_mp.artifacts.writer_processes import end_with_parent
from minitron_mp.errors import InputError, os_error_text


def main() -> None:
    """Make shards until the parent closes the standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C does
    end_with_parent(int(sys.argv[1]))
    replies = os.dup(1)
    os.dup2(2, 1)  # output of libraries must not mix with the replies

    def reply(**content: object) -> None:
        os.write(replies, json.dumps(content).encode() + b"\n")

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


if __name__ == "__main__":
    main()
