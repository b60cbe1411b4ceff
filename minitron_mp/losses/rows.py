"""Types of the arguments and results of the row functions. A row holds one token's logits.

z  logits of the student    s = z / temperature
y  logits of the teacher    u = y / temperature
n rows  v padded vocabulary, of which this rank holds v/tp columns
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from minitron_mp.losses.objective import Objective


@dataclass(frozen=True)
class TopK:
    """The teacher's k most likely tokens of n rows.

    columns int64 [n, k]: numbered from this rank's first column. A column outside [0, valid) belongs
    to another rank. log_probs float32 [n, k]. log_ghost float32 [n]: log of the probability of all
    remaining tokens.
    """

    columns: Tensor
    log_probs: Tensor
    log_ghost: Tensor


@dataclass(frozen=True)
class LogitRows:
    """Logits of n tokens on this rank, and what the loss of these tokens is.

    student, teacher: float32 or bf16 [n, v/tp]. Columns from `valid` on are padding.
    labels int64 [n]: numbered from this rank's first column. A label outside [0, valid) belongs to
    another rank. token_weights float32 [n]. top_k: of a teacher without logits.
    """

    student: Tensor
    teacher: Tensor | None
    labels: Tensor
    token_weights: Tensor
    valid: int
    objective: Objective
    top_k: TopK | None = None

    @property
    def has_teacher(self) -> bool:
        return self.teacher is not None or self.top_k is not None

    @property
    def temperature(self) -> float:
        return self.objective.temperature

    @property
    def parameters(self) -> Mapping[str, float]:
        """Parameters of the divergence by name."""
        return self.objective.parameters

    @property
    def divergence(self) -> str:
        return self.objective.divergence


class RowStatistics(NamedTuple):
    """Statistics of each row over this rank's columns, float32 [n] each.

    The maximum over no column is -inf, and the sum over no column is 0. The last three fields are 0
    without a teacher.
    """

    student_max: Tensor
    """max s"""
    student_sum: Tensor
    """sum e^(s - max s)"""
    student_sum_t1: Tensor
    """sum e^(z - max z): at temperature 1, for the cross-entropy"""
    label_logit: Tensor
    """z of the label, 0 when another rank has it"""
    teacher_max: Tensor
    """max u"""
    teacher_sum: Tensor
    """sum e^(u - max u)"""
    cross_sum: Tensor
    """sum over the columns that the divergence needs, see divergences.py"""

    @classmethod
    def unpacked(cls, table: Tensor) -> RowStatistics:
        """Return the fields of a table [..., 7]."""
        return cls(*table.unbind(-1))


class Exponentials(NamedTuple):
    """Exponentials that statistics() passes to the gradient in plain torch, float32 [n, valid].

    student: e^(s - max s). teacher: e^(u - max u), None without a teacher.
    """

    student: Tensor
    teacher: Tensor | None


@dataclass(frozen=True)
class RankStatistics:
    """Result of statistics(): table float32 [n, 7], the fields of RowStatistics.

    exponentials: of plain torch; None on a rank with only padding. top_logits: of the kernels, the
    student's logits [n, k] of the teacher's k tokens.
    """

    table: Tensor
    exponentials: Exponentials | None = None
    top_logits: Tensor | None = None


class RowValues(NamedTuple):
    """Values over the whole vocabulary that the gradient of a row needs, float32 [n] each."""

    student_lse: Tensor
    """log sum e^s"""
    teacher_lse: Tensor
    """log sum e^u"""
    student_lse_t1: Tensor
    """log sum e^z"""
    kl_weight: Tensor
    """token weight x kl_weight x temperature: the loss has the temperature squared, and the derivative
    by a logit brings 1 / temperature"""
    ce_weight: Tensor
    """weight of the cross-entropy in the loss of this token"""
    gradient_constant: Tensor
    """number that the gradient of this divergence needs once per row, see divergences.py"""


class SoftmaxSum(NamedTuple):
    """Maximum, sum and log-sum-exp of a softmax over the whole vocabulary, float32 [n] each.

    scale [tp, n]: e^(maximum on the rank - max).
    """

    max: Tensor
    scale: Tensor
    sum: Tensor
    lse: Tensor

    @classmethod
    def of(cls, rank_max: Tensor, rank_sum: Tensor) -> SoftmaxSum:
        """Combine the ranks' statistics [tp, n]."""
        largest = rank_max.amax(0)
        scale = torch.exp(rank_max - largest)
        total = (rank_sum * scale).sum(0)
        return cls(largest, scale, total, largest + total.log())


@dataclass(frozen=True)
class RowSums:
    """Statistics of each row over the whole vocabulary.

    by_rank: the statistics of each rank, [tp, n] each. All others are [n], except SoftmaxSum.scale
    [tp, n].
    """

    by_rank: RowStatistics
    student: SoftmaxSum
    teacher: SoftmaxSum
    student_lse_t1: Tensor

    @classmethod
    def of(cls, tables: Tensor, temperature: float) -> RowSums:
        """Combine the ranks' tables [tp, n, 7]."""
        by_rank = RowStatistics.unpacked(tables)
        student = SoftmaxSum.of(by_rank.student_max, by_rank.student_sum)
        sum_t1 = (by_rank.student_sum_t1 * student.scale**temperature).sum(0)
        return cls(
            by_rank,
            student,
            SoftmaxSum.of(by_rank.teacher_max, by_rank.teacher_sum),
            student.max * temperature + sum_t1.log(),
        )

    @property
    def cross_entropy(self) -> Tensor:
        return self.student_lse_t1 - self.by_rank.label_logit.sum(0)

    @property
    def lse_gap(self) -> Tensor:
        """Teacher's lse - student's lse, computed without a difference of large numbers."""
        teacher, student = self.teacher, self.student
        return (teacher.max - student.max) + (teacher.sum.log() - student.sum.log())
