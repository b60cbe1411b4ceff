"""The processes that write a checkpoint end with the process that started them.

Megatron-Core forks writers, and a manager process collects their results. After a kill -9 of a rank
they would stay alive: the manager for ever, a writer until its files are complete, in a folder that
a restarted run uses. Each of them watches its parent and ends with it.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.managers import SyncManager

PR_SET_PDEATHSIG = 1
"""Option of Linux' prctl(2): the signal of a process whose parent ends."""

WATCH_S = 1.0
"""Interval in which a helper process looks for its parent."""


class _Forks:
    """Whether children that this process forks are writers of a checkpoint, and their parent."""

    are_writers = False
    parent = 0
    by_main_thread = False


@contextmanager
def forked_writers() -> Iterator[None]:
    """In this context every forked child, and each of its children, ends with its parent."""
    _watch_forks()
    _start_manager()
    _Forks.are_writers = True
    try:
        yield
    finally:
        _Forks.are_writers = False


@functools.cache
def _watch_forks() -> None:
    def before() -> None:
        _Forks.parent = os.getpid()
        _Forks.by_main_thread = threading.current_thread() is threading.main_thread()

    def after_in_child() -> None:
        if _Forks.are_writers:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the rank decides what Ctrl-C does
            end_with_parent(_Forks.parent, at_once=_Forks.by_main_thread)

    os.register_at_fork(before=before, after_in_child=after_in_child)


def _start_manager() -> None:
    """Start the manager of the writers' results, unless this process has one.

    Megatron-Core would start the same manager, but without a watch of its parent, and with a socket
    in TMPDIR, whose path may have 107 bytes only. It keeps the queue in one variable, from 0.16 to
    0.19, and uses a queue that is already there.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is not None:
        return
    # A name that begins with a null byte is in no file system. Only Linux has such names.
    address = f"\0minitron_mp-{uuid.uuid4().hex}" if sys.platform == "linux" else None
    manager = SyncManager(address=address, ctx=multiprocessing.get_context("spawn"))
    manager.start(end_with_parent, (os.getpid(),))
    filesystem_async._results_queue = manager.Queue()


def end_with_parent(parent: int, *, at_once: bool = False) -> None:
    """End this process when its parent has ended. parent: process id.

    A thread looks for the parent, on every system. at_once: Linux also kills this process as soon as
    the thread that forked it ends.
    """
    if at_once and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch of the parent process").start()
