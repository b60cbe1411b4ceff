"""Start and end of a job, and its process groups. The only user of parallel_state and of the launch environment.

A job has one world, or one for each role (teacher, students). Megatron-Core calls collectives on the default process group, in
its optimizer and all over its checkpoints, so every role has a default group of its own; rank 0 is the first of the role. The
ranks of all roles are joined by a Bridge. Everything meets in the store of the job, under a prefix of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from minitron_mp.errors import InputError

T = TypeVar("T")


def raise_on_all_ranks(ok: Exception | None) -> None:
    """Raise on every rank when any rank has failed, so that nobody waits in the next collective; reached by all ranks."""
    if dist.get_world_size() == 1 and ok is None:
        return
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if ok is None else f"rank {dist.get_rank()}: {ok}")
    if ok is not None:
        raise ok
    failed = [e for e in errors if e]
    if failed:
        raise InputError("another rank failed: " + "; ".join(failed[:4]))


def on_rank_0(action: Callable[[], T], *, takes_long: bool = False) -> T:
    """What action() returns on rank 0 (picklable), on every rank; when it fails there, every rank raises. Reached by all ranks.

    takes_long: perhaps longer than a collective waits (half an hour), such as tokenising a corpus.
    """
    box: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except OSError as error:  # a full disk, a folder that may not be written
            failure = InputError(str(error))
            failure.__cause__ = error
        except Exception as error:
            failure = error
        box[1] = failure and str(failure)
    if takes_long and dist.get_world_size() > 1:
        _wait_for_rank_0()
    dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise InputError(f"rank 0 failed: {box[1]}")
    return box[0]


def _wait_for_rank_0() -> None:
    """Wait until rank 0 comes here, for ever: by the store, since collectives give up. Reached by all ranks, one at a time."""
    store, key = dist.distributed_c10d._get_default_store(), "rank 0 is done"
    if dist.get_rank() == 0:
        store.set(key, "")
    while True:
        try:
            store.wait([key], timedelta(minutes=5))
            break
        except dist.DistStoreError:  # not yet; a lost store is another error
            continue
    dist.barrier()
    if dist.get_rank() == 0:
        store.delete_key(key)
