"""The divergences of the distillation loss: one table, name -> formulas.

p, q: softmax of the teacher's and the student's logits over the temperature t.

    name               divergence                                  gradient by the student's logit z
    forward_kl         KL(teacher || student)  sum p log(p/q)      w t (q - p)
    reverse_kl         KL(student || teacher)  sum q log(q/p)      w t q (log(q/p) - divergence)
    skewed_forward_kl  KL(p || m)  m = skew p + (1 - skew) q       w t (q sum r - r)
                                                                   r = (1 - skew)^2 q (p - q) / m
    js                 (KL(p || m) + KL(q || m)) / 2               w t q (log(q/m) - KL(q || m)) / 2
                       m = (p + q) / 2

w t is RowValues.kl_weight = token weight x kl_weight x t: the loss has t², and d/dz brings 1/t.
In skewed_forward_kl, differentiation gives r = (1 - skew) p q / m. Subtracting a multiple of q
from r leaves the gradient unchanged. The formulas subtract (1 - skew) q: then r, sum r and the
gradient are exactly 0 for p = q.

The gradients follow from d log q_v / d s_u = [u = v] - q_u. Forward KL is the Minitron loss
(2407.14679, section 3). Skewed forward KL is a loss of DistiLLM (2402.03898); it is at most
-log(skew).

The formulas in this file are plain torch, for CPUs. kernels.py has the same formulas for GPUs,
under the same names. A new divergence needs a row in DIVERGENCES, a branch in kernels.py, and its
name in the recipe (config.distillation.DistillConfig.divergence). docs/extending.md has an example.
Parameters such as `skew` are declared in parameters.py, which the recipe reads, and arrive in
LogitRows.parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minitron_mp.losses.rows import Exponentials, LogitRows, RowStatistics, RowSums, RowValues


class CentredLogits(NamedTuple):
    """Logits / temperature minus their maximum on this rank, and their exponentials.

    Tensors are float32 [n, valid] unless another shape is given.
    """

    centred: Tensor
    exponentials: Tensor
    peak: Tensor
    """float32 [n]"""
    sum: Tensor
    """sum of the exponentials, float32 [n]"""


class DivergenceValue(NamedTuple):
    """The divergence of each row, and RowValues.gradient_constant; float32 [n] each."""

    divergence: Tensor
    gradient_constant: Tensor


@dataclass(frozen=True)
class Divergence:
    """Formulas of one divergence.

    cross_sum(rows, student, teacher): returns RowStatistics.cross_sum of this rank, [n]. It may
        overwrite the centred logits. None: the divergence needs no such sum.
    value(rows, sums, second_sums): returns the divergence. second_sums: results of second_sums(),
        summed over the ranks; None if the divergence has no second_sums.
    gradient(rows, statistics, exponentials, values, has_ce): returns the gradient of the weighted
        loss by this rank's logits, float32 [n, valid]. It includes the softmax term of the
        cross-entropy. write_gradient() subtracts 1 (times its weight) at the label.
    second_sums(rows, student_lse, teacher_lse): returns this rank's part of up to three sums,
        float32 [n, 3], that need the log-sum-exp over the whole vocabulary. They cost a second pass over
        the logits and a second all-gather. None: the divergence needs no such sums.
    """

    cross_sum: Callable[[LogitRows, CentredLogits, CentredLogits], Tensor] | None
    value: Callable[[LogitRows, RowSums, Tensor | None], DivergenceValue]
    gradient: Callable[[LogitRows, RowStatistics, Exponentials, RowValues, bool], Tensor]
    second_sums: Callable[[LogitRows, Tensor, Tensor], Tensor] | None = None


def log_skewed_mixture(
    rows: LogitRows, student_lse: Tensor, teacher_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log q, log p and log m with m = skew p + (1 - skew) q, float32 [n, valid]."""
    assert rows.teacher is not None
    skew = rows.parameters["skew"]
    log_q = log_probs(rows.student, student_lse, rows)
    log_p = log_probs(rows.teacher, teacher_lse, rows)
    return log_q, log_p, torch.logaddexp(log_q + math.log1p(-skew), log_p + math.log(skew))


def log_mixture(rows: LogitRows, student_lse: Tensor, teacher_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log q, log p and log m with m = (p + q) / 2, float32 [n, valid]."""
    assert rows.teacher is not None
    log_q = log_probs(rows.student, student_lse, rows)
    log_p = log_probs(rows.teacher, teacher_lse, rows)
    return log_q, log_p, torch.logaddexp(log_q, log_p) - math.log(2)


def log_probs(logits: Tensor, lse: Tensor, rows: LogitRows) -> Tensor:
    """Return log probabilities at the temperature, float32 [n, valid]."""
    return logits[:, : rows.valid].float() / rows.temperature - lse[:, None]


def add_cross_entropy(total: Tensor, rows: LogitRows, values: RowValues) -> Tensor:
    """Add the weighted probabilities at temperature 1 to a gradient [n, valid], in place."""
    probs = torch.exp(rows.student[:, : rows.valid].float() - values.student_lse_t1[:, None])
    total += probs * values.ce_weight[:, None]
    return total


def forward_kl_cross_sum(rows: LogitRows, student: CentredLogits, teacher: CentredLogits) -> Tensor:
    """Return sum e^(u - max u) (u - s)."""
    shift = (teacher.peak - student.peak) * teacher.sum
    return teacher.centred.sub_(student.centred).mul_(teacher.exponentials).sum(1) + shift


def forward_kl_value(rows: LogitRows, sums: RowSums, second_sums: Tensor | None) -> DivergenceValue:
    mean = (sums.by_rank.cross_sum * sums.teacher.scale).sum(0) / sums.teacher.sum
    return DivergenceValue(mean - sums.lse_gap, torch.zeros_like(mean))


def forward_kl_gradient(
    rows: LogitRows,
    statistics: RowStatistics,
    exponentials: Exponentials,
    values: RowValues,
    has_ce: bool,
) -> Tensor:
    """Return the gradient of forward KL, or of the cross-entropy alone without a teacher.

    It multiplies the exponentials of each row by a factor, in place, which gives probabilities. At
    temperature 1 the cross-entropy has the same probabilities.
    """
    shared_softmax = has_ce and rows.temperature == 1
    factor = values.kl_weight * torch.exp(statistics.student_max - values.student_lse)
    if shared_softmax:
        factor = factor + values.ce_weight * torch.exp(statistics.student_max - values.student_lse_t1)
    total = exponentials.student.mul_(factor[:, None])
    if exponentials.teacher is not None:
        teacher_factor = values.kl_weight * torch.exp(statistics.teacher_max - values.teacher_lse)
        total.addcmul_(exponentials.teacher, teacher_factor[:, None], value=-1)
    return add_cross_entropy(total, rows, values) if has_ce and not shared_softmax else total


def reverse_kl_cross_sum(rows: LogitRows, student: CentredLogits, teacher: CentredLogits) -> Tensor:
    """Return sum e^(s - max s) (s - u)."""
    shift = (student.peak - teacher.peak) * student.sum
    return student.centred.sub_(teacher.centred).mul_(student.exponentials).sum(1) + shift


def reverse_kl_value(rows: LogitRows, sums: RowSums, second_sums: Tensor | None) -> DivergenceValue:
    mean = (sums.by_rank.cross_sum * sums.student.scale).sum(0) / sums.student.sum
    divergence = mean + sums.lse_gap
    return DivergenceValue(divergence, divergence)


def reverse_kl_gradient(
    rows: LogitRows, statistics: RowStatistics, exponentials: Exponentials, values: RowValues, has_ce: bool
) -> Tensor:
    assert rows.teacher is not None
    log_q = log_probs(rows.student, values.student_lse, rows)
    log_p = log_probs(rows.teacher, values.teacher_lse, rows)
    total = log_q.exp() * (log_q - log_p - values.gradient_constant[:, None]) * values.kl_weight[:, None]
    return add_cross_entropy(total, rows, values) if has_ce else total


def skewed_forward_kl_second_sums(rows: LogitRows, student_lse: Tensor, teacher_lse: Tensor) -> Tensor:
    """Return this rank's part of the divergence, of sum r, and of sum q.

    The summand includes (1 - skew) (q - p) = m - p, which sums to 0 over the vocabulary. Adding it
    makes every summand non-negative. An error of the log-sum-exp shifts all log p of a row equally;
    this term cancels that error to first order. The same holds for log q.
    """
    log_q, log_p, log_m = log_skewed_mixture(rows, student_lse, teacher_lse)
    student_share = 1 - rows.parameters["skew"]
    p, q = log_p.exp(), log_q.exp()
    divergence = p * (log_p - log_m) + student_share * (q - p)
    r = student_share**2 * q * ((log_p - log_m).exp() - (log_q - log_m).exp())
    return torch.stack([divergence.sum(1), r.sum(1), q.sum(1)], 1)


def skewed_forward_kl_value(rows: LogitRows, sums: RowSums, second_sums: Tensor | None) -> DivergenceValue:
    """Return the divergence and sum r / sum q.

    sum q differs from 1 by rounding. Dividing by it makes the gradient of a row sum to 0.
    """
    assert second_sums is not None
    return DivergenceValue(second_sums[:, 0], second_sums[:, 1] / second_sums[:, 2])


def skewed_forward_kl_gradient(
    rows: LogitRows, statistics: RowStatistics, exponentials: Exponentials, values: RowValues, has_ce: bool
) -> Tensor:
    log_q, log_p, log_m = log_skewed_mixture(rows, values.student_lse, values.teacher_lse)
    ratio = (log_p - log_m).exp() - (log_q - log_m).exp()
    r = (1 - rows.parameters["skew"]) ** 2 * ratio
    total = log_q.exp() * (values.gradient_constant[:, None] - r) * values.kl_weight[:, None]
    return add_cross_entropy(total, rows, values) if has_ce else total


def js_second_sums(rows: LogitRows, student_lse: Tensor, teacher_lse: Tensor) -> Tensor:
    """Return this rank's part of KL(p || m) and KL(q || m)."""
    log_q, log_p, log_m = log_mixture(rows, student_lse, teacher_lse)
    of_p = (log_p.exp() * (log_p - log_m)).sum(1)
    of_q = (log_q.exp() * (log_q - log_m)).sum(1)
    return torch.stack([of_p, of_q, torch.zeros_like(of_p)], 1)


def js_value(rows: LogitRows, sums: RowSums, second_sums: Tensor | None) -> DivergenceValue:
    assert second_sums is not None
    return DivergenceValue(second_sums[:, :2].mean(1), second_sums[:, 1])


def js_gradient(
    rows: LogitRows, statistics: RowStatistics, exponentials: Exponentials, values: RowValues, has_ce: bool
) -> Tensor:
    log_q, _log_p, log_m = log_mixture(rows, values.student_lse, values.teacher_lse)
    total = (
        log_q.exp() * (log_q - log_m - values.gradient_constant[:, None]) * (values.kl_weight / 2)[:, None]
    )
    return add_cross_entropy(total, rows, values) if has_ce else total


DIVERGENCES = {
    "forward_kl": Divergence(forward_kl_cross_sum, forward_kl_value, forward_kl_gradient),
    "reverse_kl": Divergence(reverse_kl_cross_sum, reverse_kl_value, reverse_kl_gradient),
    "skewed_forward_kl": Divergence(
        None, skewed_forward_kl_value, skewed_forward_kl_gradient, skewed_forward_kl_second_sums
    ),
    "js": Divergence(None, js_value, js_gradient, js_second_sums),
}
