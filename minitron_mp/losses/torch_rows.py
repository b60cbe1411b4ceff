"""Row functions of the distillation loss in plain torch: for CPUs, and to test kernels.py.

kernel_calls.py has the same functions for CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_mp.losses.divergences import DIVERGENCES, CentredLogits
from minitron_mp.losses.rows import Exponentials, LogitRows, RowStatistics, RowValues


def statistics(rows: LogitRows, divergence: str) -> tuple[RowStatistics, Exponentials | None]:
    """Return the statistics of each row, and the exponentials when this rank has valid columns."""
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
        row_statistics = RowStatistics(student.peak, student.sum, sum_t1, label_logit, zeros, zeros, zeros)
        return row_statistics, Exponentials(student.exponentials, None)
    teacher = _centre(rows.teacher, rows)
    cross_sum = DIVERGENCES[divergence].cross_sum
    cross = zeros if cross_sum is None else cross_sum(rows, student, teacher)
    row_statistics = RowStatistics(
        student.peak, student.sum, sum_t1, label_logit, teacher.peak, teacher.sum, cross
    )
    return row_statistics, Exponentials(student.exponentials, teacher.exponentials)


def second_sums(rows: LogitRows, divergence: str, student_lse: Tensor, teacher_lse: Tensor) -> Tensor:
    """Return Divergence.second_sums of this rank, float32 [n, 3]."""
    sums = DIVERGENCES[divergence].second_sums
    assert sums is not None
    return sums(rows, student_lse, teacher_lse)


def gradient(
    rows: LogitRows,
    statistics: RowStatistics,
    exponentials: Exponentials | None,
    values: RowValues,
    divergence: str,
    has_ce: bool,
    out: Tensor,
) -> None:
    """Write the gradient of the weighted loss by the student's logits into out.

    out: [n, v/tp], any float dtype. It becomes 0 in the padding and in rows without weight.
    statistics, exponentials: results of statistics(). The exponentials are overwritten.
    has_ce: whether any row has a weight for the cross-entropy.
    """
    if exponentials is None:  # all columns are padding
        out.zero_()
        return
    formulas = DIVERGENCES["forward_kl" if rows.teacher is None else divergence]
    total = formulas.gradient(rows, statistics, exponentials, values, has_ce)
    write_gradient(total, rows, values, has_ce, out)


def write_gradient(total: Tensor, rows: LogitRows, values: RowValues, has_ce: bool, out: Tensor) -> None:
    """Subtract one at the label from the probabilities total [n, valid], and write them to out."""
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
