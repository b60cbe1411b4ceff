"""Row functions of the distillation loss in plain torch: for CPUs, and to test kernels.py.

kernel_calls.py has the same functions for CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_mp.losses import top_k
from minitron_mp.losses.divergences import DIVERGENCES, CentredLogits, DivergenceValue
from minitron_mp.losses.rows import (
    Exponentials,
    LogitRows,
    RankStatistics,
    RowStatistics,
    RowSums,
    RowValues,
)


def statistics(rows: LogitRows) -> RankStatistics:
    """Return the statistics of each row over this rank's columns."""
    fields, exponentials = _statistics(rows)
    if rows.top_k is not None:
        fields = top_k.add_statistics(rows, rows.top_k, fields)
    return RankStatistics(torch.stack(fields, 1), exponentials)


def _statistics(rows: LogitRows) -> tuple[RowStatistics, Exponentials | None]:
    zeros = rows.student.new_zeros(len(rows.student), dtype=torch.float32)
    if rows.valid == 0:
        no_maximum = torch.full_like(zeros, -torch.inf)
        teacher_max = zeros if rows.teacher is None else no_maximum
        return RowStatistics(no_maximum, zeros, zeros, zeros, teacher_max, zeros, zeros), None
    is_here = (rows.labels >= 0) & (rows.labels < rows.valid)
    columns = rows.labels.clamp(0, rows.valid - 1)[:, None]
    label_logit = torch.where(is_here, rows.student.gather(1, columns)[:, 0].float(), 0.0)
    student = _centre(rows.student, rows)
    t = rows.temperature
    sum_t1 = torch.exp(student.centred * t).sum(1) if t != 1 else student.sum
    if rows.teacher is None:
        fields = RowStatistics(student.peak, student.sum, sum_t1, label_logit, zeros, zeros, zeros)
        return fields, Exponentials(student.exponentials, None)
    teacher = _centre(rows.teacher, rows)
    cross_sum = DIVERGENCES[rows.divergence].cross_sum
    cross = zeros if cross_sum is None else cross_sum(rows, student, teacher)
    fields = RowStatistics(student.peak, student.sum, sum_t1, label_logit, teacher.peak, teacher.sum, cross)
    return fields, Exponentials(student.exponentials, teacher.exponentials)


def second_sums(rows: LogitRows, tables: Tensor) -> Tensor:
    """Return Divergence.second_sums of this rank, float32 [n, 3]. tables: of all ranks, [tp, n, 7]."""
    formula = DIVERGENCES[rows.divergence].second_sums
    assert formula is not None
    sums = RowSums.of(tables, rows.temperature)
    return formula(rows, sums.student.lse, sums.teacher.lse)


def finish(
    rows: LogitRows,
    own: RankStatistics,
    tables: Tensor,
    second_sums: Tensor | None,
    losses: Tensor,
    gradient: Tensor | None,
) -> None:
    """Write (loss without token weight, divergence, CE) into losses [3, n], and the gradient.

    own: result of statistics(); its exponentials are overwritten. tables, second_sums: of all ranks,
    [tp, n, 7] and [tp, n, 3]. gradient: [n, v/tp], any float dtype, may be the student's logits;
    None if it is not needed. It becomes the gradient of the weighted loss by the student's logits, 0
    in the padding and in rows without weight.
    """
    objective, t = rows.objective, rows.temperature
    sums = RowSums.of(tables, t)
    result = _value(rows, sums, None if second_sums is None else second_sums.sum(0))
    ce = sums.cross_entropy
    total = objective.kl_weight * t**2 * result.divergence + objective.ce_weight * ce
    torch.stack([total, result.divergence, ce], out=losses)
    if gradient is None:
        return
    values = RowValues(
        student_lse=sums.student.lse,
        teacher_lse=sums.teacher.lse if rows.has_teacher else torch.zeros_like(ce),
        student_lse_t1=sums.student_lse_t1,
        kl_weight=rows.token_weights * (objective.kl_weight * t),
        ce_weight=rows.token_weights * objective.ce_weight,
        gradient_constant=result.gradient_constant,
    )
    write_gradient(rows, own, values, gradient)


def _value(rows: LogitRows, sums: RowSums, second_sums: Tensor | None) -> DivergenceValue:
    if rows.top_k is not None:
        return top_k.value(rows.top_k, sums)
    if rows.teacher is None:
        zeros = torch.zeros_like(sums.cross_entropy)
        return DivergenceValue(zeros, zeros)
    return DIVERGENCES[rows.divergence].value(rows, sums, second_sums)


def write_gradient(rows: LogitRows, own: RankStatistics, values: RowValues, out: Tensor) -> None:
    """Write the gradient that finish() describes into out [n, v/tp]."""
    if own.exponentials is None:  # all columns are padding
        out.zero_()
        return
    has_ce = rows.objective.ce_weight > 0
    if rows.top_k is not None:
        total = top_k.gradient(rows, rows.top_k, values, has_ce)
    else:
        formulas = DIVERGENCES["forward_kl" if rows.teacher is None else rows.divergence]
        fields = RowStatistics.unpacked(own.table)
        total = formulas.gradient(rows, fields, own.exponentials, values, has_ce)
    if has_ce:
        is_here = (rows.labels >= 0) & (rows.labels < rows.valid)
        ones = -values.ce_weight[:, None] * is_here[:, None]
        total.scatter_add_(1, rows.labels.clamp(0, rows.valid - 1)[:, None], ones)
    out[:, : rows.valid] = total
    out[:, rows.valid :] = 0
    has_no_weight = (values.kl_weight == 0) & (values.ce_weight == 0)
    out.masked_fill_(has_no_weight[:, None], 0.0)  # such a row may hold NaN


def _centre(logits: Tensor, rows: LogitRows) -> CentredLogits:
    t = rows.temperature
    logits = logits[:, : rows.valid]
    peak = logits.amax(1, keepdim=True).float()
    # .float() copies bf16 logits, but returns a float32 tensor itself, which must not change.
    centred = logits.float() - peak if logits.dtype == torch.float32 else logits.float().sub_(peak)
    if t != 1:
        centred, peak = centred.div_(t), peak / t
    exponentials = torch.exp(centred)
    return CentredLogits(centred, exponentials, peak[:, 0], exponentials.sum(1))
