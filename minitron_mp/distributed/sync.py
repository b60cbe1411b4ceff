"""Run a function on rank 0 only, and raise errors on all ranks together."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed as dist

from minitron_mp.errors import InputError, OtherRankError, os_error_text

T = TypeVar("T")


def raise_on_all_ranks(error: Exception | None) -> None:
    """Raise on every rank when any rank has an error, so that no rank waits in the next collective.

    error: error of this rank, or None. Ranks without an error raise an OtherRankError that names
    the failed ranks. Reached by all ranks.
    """
    if dist.get_world_size() == 1 and error is None:
        return
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, None if error is None else f"rank {dist.get_rank()}: {error}")
    if error is not None:
        raise error
    failed = [text for text in texts if text]
    if failed:
        raise OtherRankError("another rank failed: " + "; ".join(failed[:4]))


def on_rank_0(action: Callable[[], T], *, takes_long: bool = False) -> T:
    """Run action on rank 0 and return its result (picklable) on every rank; reached by all ranks.

    If action fails, every rank raises. takes_long: action may take longer than the timeout of a
    collective (recipe key timeout_minutes), for example to tokenize a corpus.
    """
    result: T | None = None
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            result = action()
        except OSError as error:  # a full disk, a folder without write permission
            failure = InputError(os_error_text(error))
            failure.__cause__ = error
        except Exception as error:
            failure = error
    if takes_long and dist.get_world_size() > 1:
        _wait_for_rank_0()
    message = [result, None if failure is None else str(failure)]
    dist.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    if message[1] is not None:
        raise OtherRankError(f"rank 0 failed: {message[1]}")
    return cast(T, message[0])


def _wait_for_rank_0() -> None:
    """Wait without a timeout until rank 0 calls this function; reached by all ranks.

    It uses the store, because collectives have a timeout. Two calls must not overlap.
    """
    store, key = dist.distributed_c10d._get_default_store(), "rank 0 is done"
    if dist.get_rank() == 0:
        store.set(key, "")
    while True:
        try:
            store.wait([key], timedelta(minutes=5))
            break
        except dist.DistStoreError:  # a timeout; a lost store raises a different error
            continue
    dist.barrier()
    if dist.get_rank() == 0:
        store.delete_key(key)
