"""Samples of each text of a blend, computed from the shares in the recipe.

This file imports neither torch nor Megatron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minitron_mp.config.blend import Share

TOLERANCE = 0.01
"""Epochs and tokens without weights may differ by this share from the samples of the run, because a
run has a whole number of steps. They are scaled to it."""


@dataclass(frozen=True)
class BlendedText:
    """A text of a blend: its share, and its samples in one epoch."""

    name: str
    share: Share
    epoch_samples: int


def blend_samples(texts: Sequence[BlendedText], num_samples: int, sequence_length: int) -> list[float]:
    """Return the samples of each text in a run of `num_samples` samples. Their sum is num_samples.

    Texts with epochs or tokens have these, and the others divide the rest by their weights. The
    result is valid if blend_problem() returns None.
    """
    fixed = [_fixed_samples(text, sequence_length) for text in texts]
    total = sum(fixed)
    weights = sum(text.share.amount for text in texts if text.share.unit == "weight")
    if not weights:
        return [num_samples * samples / total for samples in fixed]
    rest = num_samples - total
    return [
        rest * text.share.amount / weights if text.share.unit == "weight" else samples
        for text, samples in zip(texts, fixed)
    ]


def blend_problem(
    part: str, texts: Sequence[BlendedText], num_samples: int, sequence_length: int
) -> str | None:
    """Return a sentence if epochs and tokens do not fit a run of `num_samples` samples."""
    total = sum(_fixed_samples(text, sequence_length) for text in texts)
    has_weights = any(text.share.unit == "weight" for text in texts)
    if not total:
        return None
    given = (
        f"data.{part}: the epochs and tokens of its texts are {total * sequence_length:,.0f} tokens, and "
        f"the run has {num_samples * sequence_length:,} ({num_samples:,} samples)"
    )
    if has_weights and total >= num_samples:
        return f"{given}, so nothing is left for the texts with weights; lower them, or raise the steps"
    if not has_weights and abs(total / num_samples - 1) > TOLERANCE:
        return f"{given}; give one text a weight, which takes the rest, or change the number of steps"
    return None


def blend_rows(
    texts: Sequence[BlendedText], weights: Sequence[float], num_samples: int, sequence_length: int
) -> list[str]:
    """Return a line for each text: its share, tokens and epochs in a run of num_samples samples."""
    shares = [weight / sum(weights) for weight in weights]
    return [
        f"{text.name}: {share:.2%} of the samples, {share * num_samples * sequence_length:,.0f} tokens, "
        f"{share * num_samples / text.epoch_samples:.3g} epochs"
        for text, share in zip(texts, shares)
    ]


def _fixed_samples(text: BlendedText, sequence_length: int) -> float:
    """Return the samples that epochs or tokens fix; 0 for a weight."""
    if text.share.unit == "epochs":
        return text.share.amount * text.epoch_samples
    return text.share.amount / sequence_length if text.share.unit == "tokens" else 0.0
