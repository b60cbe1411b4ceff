"""Blends: several texts of one part of the text, and the share of each in a run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator

from minitron_mp.config.base import read_number
from minitron_mp.config.paths import expand_path

UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}

SHARE = re.compile(r"([\d.]+(?:e\+?\d+)?)\s*([KMBT]?)\s+(tokens|epochs?)", re.IGNORECASE)
"""A number of tokens or epochs: "5B tokens", "2 epochs"."""


@dataclass(frozen=True)
class Share:
    """The share of a text in a blend.

    unit "epochs" or "tokens": number of each run. unit "weight": part of the rest of the run, in
    proportion to the other weights.
    """

    amount: float
    unit: Literal["weight", "epochs", "tokens"]


def read_share(value: object) -> Share:
    """Return the share that a recipe gives: 3, "2 epochs" or "5B tokens". ValueError for others."""
    share: Share | None = None
    match = SHARE.fullmatch(value.strip()) if isinstance(value, str) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        share = Share(float(value), "weight")
    elif match and match[3].lower() == "tokens":
        share = Share(_number(match[1]) * UNITS[match[2].upper()], "tokens")
    elif match and not match[2]:
        share = Share(_number(match[1]), "epochs")
    if share is None or not 0 < share.amount < float("inf"):
        raise ValueError(
            f"{value!r} is not the share of a text; give a weight above 0, 2 epochs, or 5B tokens"
        )
    return share


def shares_of(texts: Iterable[str]) -> tuple[Share, ...] | None:
    """Return the share of each text of a blend, or None for a list of texts."""
    return tuple(map(read_share, texts.values())) if isinstance(texts, dict) else None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _read_texts(value: object) -> object:
    """Return a list of expanded paths, or a map from expanded path to share."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        if not all(isinstance(path, str) for path in value):
            raise ValueError(f"must be paths, or a map from paths to shares, given {value!r}; correct it")
        return [expand_path(path) for path in value]
    if not isinstance(value, dict):
        raise ValueError(f"must be paths, or a map from paths to shares, given {value!r}; correct it")
    texts: dict[str, float | str] = {}
    for key, share in value.items():
        path = expand_path(str(key))
        if path in texts:
            raise ValueError(f"{path} occurs twice; give one share")
        number = read_number(share) if isinstance(share, str) else share
        read_share(number)
        texts[path] = number if isinstance(number, str) else float(number)
    return texts


UserTexts = Annotated[list[str] | dict[str, float | str], BeforeValidator(_read_texts)]
"""Paths of texts, or a blend: a map from path to share. A single path needs no brackets."""
