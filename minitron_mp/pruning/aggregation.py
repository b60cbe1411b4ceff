"""How activations become scores: aggregation over the sequence, then over samples.

    a [s, b, d]   activations of one probe
    m [b, d]      aggregate of each sample over the sequence
    score [d]     aggregate of m over the samples

A new criterion is a row here, and its name in SequenceAggregation or BatchAggregation of
config/pruning.py. Ranks that split a sequence add their `partial` results before `finish`. So
`partial` returns sums over tokens; with another reduce_op it returns what that operation combines,
for example maxima. An aggregation over samples gets only sum m and sum m²; it never sees single
samples.
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

    partial: a [s, b, d] in its dtype -> sums [statistics, b, d] float32 over this rank's tokens. It
    reads the tensor once for each statistic, without a float32 copy. finish: sums over the whole
    sequence, and its number of tokens -> m [b, d]. reduce_op: combines the results of `partial` of
    ranks that split a sequence. With ReduceOp.MAX, `partial` returns maxima over tokens.
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
