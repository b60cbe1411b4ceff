"""What the distillation loss optimises, and what it takes from a teacher.

s sequence  b microbatch  v padded vocabulary  h_t hidden size of the teacher
s' is s/cp, or s/cp/tp under sequence parallelism
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """Weights of the loss. The user's form of it is config.distillation.DistillConfig."""

    divergence: str = "forward_kl"
    """A key of divergences.DIVERGENCES."""
    temperature: float = 1.0
    kl_weight: float = 1.0
    """Weight of the divergence, times temperature squared."""
    ce_weight: float = 0.0
    """Weight of the cross-entropy with the labels."""
    logits_dtype: torch.dtype = torch.float32
    """Of the logits between the matrix product and the sums over a row. With bf16 inputs and 131072
    columns, bf16 logits make the error of the gradient 10 times that of float32 logits, and are a
    little faster."""


@dataclass(frozen=True)
class TeacherHidden:
    """Hidden states and output layer of a teacher; the loss computes its logits tile by tile.

    hidden [s', b, h_t] after the final norm. weight [v_t/tp, h_t], the same columns of the
    vocabulary as the student's on this rank (the padding may differ).
    """

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class TeacherLogits:
    """Logits of a teacher.

    [s/cp, b, v_t/tp], the same columns as the student's on this rank (the padding may differ).
    """

    logits: Tensor


@dataclass(frozen=True)
class TeacherTopK:
    """The k most likely tokens at the temperature of the loss, equal on all tensor-parallel ranks.

    indices int64 [s', b, k] in the whole vocabulary. log_probs float32 [s', b, k]. log_ghost
    float32
    [s', b, 1]: log of the probability of all other tokens, -inf when there are none.
    """

    indices: Tensor
    log_probs: Tensor
    log_ghost: Tensor


TeacherTarget = TeacherHidden | TeacherLogits | TeacherTopK
