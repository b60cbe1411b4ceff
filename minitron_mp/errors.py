"""How a user is told what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class InputError(ValueError):
    """The user's input cannot be used. The text says what was given, what is allowed and what to do."""


def refuse(title: str, problems: Sequence[str]) -> None:
    """Raise one InputError that lists every problem; do nothing when there is none."""
    if problems:
        raise InputError("\n".join([title, *(f"  - {p}" for p in problems)]))


def must_divide(name: str, size: int, micro_batch_size: int, dp: int, interleaved: int = 1) -> str | None:
    """A sentence for the user unless a batch divides evenly; interleaved: pp under vpp, whose schedule wants multiples of it."""
    unit = micro_batch_size * dp * interleaved
    if size % unit == 0:
        return None
    parts = f"micro_batch_size {micro_batch_size} x data parallel size {dp}" + f" x pp {interleaved}" * (
        interleaved > 1
    )
    return (
        f"{name} {size} must be a multiple of {unit} ({parts}); nearest {max(1, round(size / unit)) * unit}"
    )


def differing_fields(
    a: Mapping[str, Any], b: Mapping[str, Any], of_a: str = "", of_b: str = "here"
) -> list[str]:
    """'name: x, here y' for every key on which two flat mappings differ, also where one has none; for error messages."""
    return [
        f"{k}: {of_a}{' ' * bool(of_a)}{a.get(k)!r}, {of_b} {b.get(k)!r}"
        for k in sorted({*a, *b})
        if (k in a, a.get(k)) != (k in b, b.get(k))
    ]
