"""Run a function on rank 0 only, and raise errors on all ranks together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TypeVar, cast

import torch.distributed as dist

from minitron_mp.distributed.process_groups import host_barrier, host_group, timeout_of
from minitron_mp.errors import InputError, OtherRankError, os_error_text

T = TypeVar("T")

HEARTBEAT_S = 10.0
"""Seconds between two heartbeats of rank 0 while the other ranks wait for it."""

HEARTBEAT, DONE = "heartbeat of rank 0", "rank 0 is done"
"""Keys in the store: a number that rank 0 raises while it works, and its end."""


def raise_on_all_ranks(error: Exception | None) -> None:
    """Raise on every rank when any rank has an error, so that no rank waits in the next collective.

    error: error of this rank, or None. Ranks without an error raise an OtherRankError that names
    the failed ranks. Reached by all ranks.
    """
    if dist.get_world_size() == 1 and error is None:
        return
    texts: list[str | None] = [None] * dist.get_world_size()
    text = None if error is None else f"rank {dist.get_rank()}: {error}"
    dist.all_gather_object(texts, text, group=host_group())
    if error is not None:
        raise error
    failed = [text for text in texts if text]
    if failed:
        raise OtherRankError("another rank failed: " + "; ".join(failed[:4]))


def on_rank_0(action: Callable[[], T], *, takes_long: bool = False) -> T:
    """Run action on rank 0 and return its result (picklable) on every rank; reached by all ranks.

    If action fails, every rank raises. takes_long: action may take longer than the timeout of a
    collective (recipe key timeout_minutes), for example to tokenize a corpus. The other ranks then
    wait as long as the process of rank 0 runs. OtherRankError if it hangs for that timeout.
    """
    result: T | None = None
    failure: Exception | None = None
    waits = takes_long and dist.get_world_size() > 1
    if dist.get_rank() == 0:
        try:
            with _heartbeat() if waits else nullcontext():
                result = action()
        except OSError as error:  # a full disk, a folder without write permission
            failure = InputError(os_error_text(error))
            failure.__cause__ = error
        except Exception as error:
            failure = error
    if waits:
        _wait_for_rank_0()
    message = [result, None if failure is None else str(failure)]
    dist.broadcast_object_list(message, src=0, group=host_group())
    if failure is not None:
        raise failure
    if message[1] is not None:
        raise OtherRankError(f"rank 0 failed: {message[1]}")
    return cast(T, message[0])


@contextmanager
def _heartbeat() -> Iterator[None]:
    """Count in the store while this context is active; for rank 0."""
    store = dist.distributed_c10d._get_default_store()
    end = threading.Event()

    def count() -> None:
        with suppress(dist.DistError):  # the store is lost; the main thread finds that, too
            while not end.wait(HEARTBEAT_S):
                store.add(HEARTBEAT, 1)

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _wait_for_rank_0() -> None:
    """Wait until rank 0 calls this function; reached by all ranks. Two calls must not overlap.

    It uses the store, because collectives have a timeout. OtherRankError if rank 0 does not count
    for the timeout of a collective.
    """
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        store.set(DONE, "")
    else:
        _Wait(store).join(timeout_of(host_group()).total_seconds())
    host_barrier()
    if dist.get_rank() == 0:
        store.delete_key(DONE)


class _Wait:
    """A wait at the store on a thread, because a store whose process is suspended never answers."""

    def __init__(self, store: dist.Store):
        self.store = store
        self.ended = threading.Event()
        self.error: Exception | None = None
        self.last_beat = time.monotonic()
        threading.Thread(target=self._wait, daemon=True).start()

    def join(self, timeout_s: float) -> None:
        """Return when rank 0 is done."""
        while not self.ended.wait(min(1.0, timeout_s / 4)):
            silent_s = time.monotonic() - self.last_beat
            if silent_s > timeout_s + HEARTBEAT_S:
                raise OtherRankError(
                    f"rank 0 or its store has not responded for {silent_s:.0f} s, timeout_minutes allows "
                    f"{timeout_s / 60:g} minutes; the same command resumes"
                )
        if self.error is not None:
            raise self.error

    def _wait(self) -> None:
        # It polls, because a wait at the store that times out prints two warnings.
        beats, pause_s = -1, 0.01
        try:
            while not self.store.check([DONE]):
                new_beats = self.store.add(HEARTBEAT, 0)
                if new_beats != beats:
                    beats, self.last_beat = new_beats, time.monotonic()
                time.sleep(pause_s)
                pause_s = min(0.5, pause_s * 1.2)
        except Exception as error:  # the store is lost
            self.error = error
        self.ended.set()
