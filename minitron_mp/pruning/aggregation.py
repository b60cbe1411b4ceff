"""How activations become scores: aggregation over the sequence, then over samples.

    a [s, b, d]   activations of one probe
    m [b, d]      aggregate of each sample over the sequence
    score [d]     aggregate of m over the samples

A new criterion is a row here, and its name in SequenceAggregation or BatchAggregation of
config/pruning.py; docs/extending.md has an example. An aggregation over samples gets only sum m,
sum m² and the number of samples. It never gets single samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ReduceOp


@dataclass(frozen=True)
class SequenceAggregation:
    """One aggregation over the sequence, in two steps.

    partial: a [s, b, d] in its dtype -> statistics [n, b, d] float32 of this rank's tokens, for
    example sums. Avoid a float32 copy of a: it can be as large as the MLP's activations.
    reduce_op: how ranks that split a sequence combine their statistics. With ReduceOp.MAX,
    `partial` returns maxima over tokens.
    finish: statistics of the whole sequence, and its number of tokens -> m [b, d].
    """

    partial: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor, int], Tensor]
    reduce_op: ReduceOp.RedOpType = ReduceOp.SUM


def _absolute_sums(a: Tensor) -> Tensor:
    if a.is_cuda:
        return torch.linalg.vector_norm(a, 1, dim=0, dtype=torch.float32)[None]
    # On a CPU 40 times faster than vector_norm, at the cost of one copy in the dtype of a.
    return a.abs().sum(0, dtype=torch.float32)[None]


def _square_sums(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, 2, dim=0, dtype=torch.float32).square()[None]


def _sums_and_square_sums(a: Tensor) -> Tensor:
    return torch.stack([a.sum(0, dtype=torch.float32), _square_sums(a)[0]])


def _variance(sums: Tensor, tokens: int) -> Tensor:
    return (sums[1] / tokens - (sums[0] / tokens) ** 2).clamp(min=0)


SEQUENCE_AGGREGATIONS = {
    "mean": SequenceAggregation(_absolute_sums, lambda sums, tokens: sums[0] / tokens),
    "l2": SequenceAggregation(_square_sums, lambda sums, tokens: sums[0].sqrt()),
    "var": SequenceAggregation(_sums_and_square_sums, _variance),
}
"""Name -> aggregation over the sequence. mean: of |a|."""

BATCH_AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mean": lambda total, squares, samples: total / samples,
    "l2": lambda total, squares, samples: squares.sqrt(),
    "var": lambda total, squares, samples: (squares / samples - (total / samples) ** 2).clamp(min=0),
}
"""Name -> (sum of m, sum of m squared, number of samples) -> score, all float64 [d]."""
