"""Errors about the user's input, and helpers for their text."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence


class InputError(ValueError):
    """Error of the user's input. Its text states what was given, what is allowed and what to do."""


class TransientError(InputError):
    """Raised for a failure that a restart may not repeat: of a process, a rank or the file system."""


class OtherRankError(TransientError):
    """Raised on a rank because another rank has failed. Its text has the error of that rank."""


def refuse(title: str, problems: Sequence[str]) -> None:
    """Raise one InputError that lists every problem. Do nothing if the list is empty."""
    if problems:
        raise InputError("\n".join([title, *(f"  - {problem}" for problem in problems)]))


OPEN_FILES_ADVICE = "raise the limit of open files with `ulimit -n 4096` in the same shell"


def os_error_text(error: OSError) -> str:
    """Return the text of an OSError, with what to do where that is known."""
    advice = {
        errno.ENOSPC: "free some space or set another output; the same command resumes",
        errno.EDQUOT: "the quota is used up: free some space or set another output; the same command resumes",
        errno.EFBIG: "the file is above the limit of the file system or of `ulimit -f`",
        errno.EMFILE: OPEN_FILES_ADVICE,
        errno.ENFILE: "the machine has too many open files; end other processes",
        errno.EROFS: "set another output",
        errno.ENAMETOOLONG: "the file system allows 255 bytes in a name; give a shorter one",
        errno.EACCES: "change the permissions, or set another output",
    }
    text = str(error)
    return f"{text}; {advice[error.errno]}" if error.errno in advice else text


def must_divide(name: str, size: int, micro_batch_size: int, dp: int, interleaved: int = 1) -> str | None:
    """Return an error text unless a batch divides evenly into microbatches and ranks.

    interleaved: pp when vpp is set, because the interleaved schedule needs multiples of pp;
    otherwise 1.
    """
    unit = micro_batch_size * dp * interleaved
    if size % unit == 0:
        return None
    parts = f"micro_batch_size {micro_batch_size} x data parallel size {dp}"
    if interleaved > 1:
        parts += f" x pp {interleaved}"
    nearest = max(1, round(size / unit)) * unit
    return f"{name} {size} must be a multiple of {unit} ({parts}); nearest {nearest}"


def differing_fields(
    a: Mapping[str, object], b: Mapping[str, object], name_of_a: str = "", name_of_b: str = "here"
) -> list[str]:
    """List 'key: x, here y' for every key on which two flat mappings differ, for error messages.

    A key that is missing in one of the mappings counts as a difference.
    """
    rows = []
    for key in sorted({*a, *b}):
        if (key in a) != (key in b) or a.get(key) != b.get(key):
            value_of_a = f"{name_of_a} {a.get(key)!r}" if name_of_a else repr(a.get(key))
            rows.append(f"{key}: {value_of_a}, {name_of_b} {b.get(key)!r}")
    return rows
