"""Errors while a checkpoint is read or written, as sentences.

A TransientError may not happen again, for example after a lost mount or the end of another rank. The
user can correct all others only.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import ProcessError
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import CheckpointException

from minitron_mp.artifacts.files import aside_path
from minitron_mp.errors import InputError, OtherRankError, TransientError

DAMAGE_ERRORS = (
    dist_checkpointing.core.CheckpointingException,
    KeyError,
    ValueError,
    OSError,
    EOFError,
    RuntimeError,
    pickle.UnpicklingError,
)
"""Errors of torch and Megatron for a missing, truncated or unknown file in a checkpoint."""

MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""Errors of the file system that belong to the checkpoint and not to the disk."""


@contextmanager
def read_errors(folder: Path) -> Iterator[None]:
    """Convert the errors of reading a checkpoint to InputError."""
    try:
        yield
    except dist.DistError:
        raise
    except (CheckpointException, *DAMAGE_ERRORS) as error:
        cause = _cause(error)
        if _is_lost_rank(cause):
            raise OtherRankError(
                f"another rank has ended while {folder} was read ({_text(cause)}); see its error"
            ) from error
        if isinstance(cause, OSError) and not isinstance(cause, MISSING):
            raise TransientError(
                f"{folder} cannot be read: {_text(cause)}; check the disk and the permissions, and run the "
                "same command again"
            ) from error
        raise InputError(
            f"{folder} is damaged or not a checkpoint of this model: {_text(cause)}; "
            "delete it and run its stage again"
        ) from error


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Convert the errors of a save to TransientError, and delete the incomplete files.

    It does not communicate, because an error may be on one rank only, while the other ranks wait in
    a collective of Megatron.
    """
    try:
        yield
    except (EOFError, ConnectionError, ProcessError) as error:
        discard(folder)
        raise TransientError(
            f"{folder} could not be written: the helper process of the checkpoint writers has ended "
            f"({_text(error)}). It may have been killed, for example for lack of memory; run the same "
            "command again"
        ) from error
    except (OSError, RuntimeError, CheckpointException) as error:
        # The cause may be a quota or a lost mount. The old artifact is unchanged.
        discard(folder)
        cause = _cause(error)
        if _is_lost_rank(cause):
            raise OtherRankError(
                f"another rank has ended while {folder} was written ({_text(cause)}); see its error"
            ) from error
        raise TransientError(
            f"{folder} could not be written: {_text(cause)}; check the disk, or set another output"
        ) from error
    except BaseException:  # of `extra`, or an interrupt
        discard(folder)
        raise


def discard(folder: Path) -> None:
    """Delete the temporary folder of an artifact, on rank 0."""
    if dist.get_rank() == 0:
        shutil.rmtree(aside_path(folder), ignore_errors=True)


def _is_lost_rank(cause: BaseException | None) -> bool:
    return isinstance(cause, dist.DistError) or any(
        words in str(cause) for words in ("closed by peer", "Timed out waiting")
    )


def _cause(error: BaseException) -> BaseException | None:
    """Return the error behind torch's CheckpointException, which is a BaseException.

    It holds the failures by rank, but only on the first rank; None on the others.
    """
    cause: BaseException | None = error
    while isinstance(cause, CheckpointException):
        failures = list(cause.failures.values())
        cause = failures[0][0] if failures else None
    return cause


def _text(cause: BaseException | None) -> str:
    """Return an error on one line."""
    return f"{type(cause).__name__} {cause}".strip() if cause is not None else "see the error of rank 0"
