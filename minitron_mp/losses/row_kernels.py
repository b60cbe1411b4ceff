"""Triton kernels of the distillation loss that read a few numbers per row. See kernels.py.

tables [ranks, num_rows, 7]: RowStatistics of all tensor-parallel ranks. values [num_rows, 6]:
RowValues.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minitron_mp.losses.rows import RowStatistics, RowValues


def _statistic(name: str) -> tl.constexpr:
    return tl.constexpr(RowStatistics._fields.index(name))


def _row_value(name: str) -> tl.constexpr:
    return tl.constexpr(RowValues._fields.index(name))


# Columns of the tables that the kernels write and read.
NUM_STATISTICS = tl.constexpr(len(RowStatistics._fields))
STUDENT_MAX = _statistic("student_max")
STUDENT_SUM = _statistic("student_sum")
STUDENT_SUM_T1 = _statistic("student_sum_t1")
LABEL_LOGIT = _statistic("label_logit")
TEACHER_MAX = _statistic("teacher_max")
TEACHER_SUM = _statistic("teacher_sum")
CROSS_SUM = _statistic("cross_sum")
NUM_SECOND_SUMS = tl.constexpr(3)
NUM_VALUES = tl.constexpr(len(RowValues._fields))
STUDENT_LSE = _row_value("student_lse")
TEACHER_LSE = _row_value("teacher_lse")
STUDENT_LSE_T1 = _row_value("student_lse_t1")
KL_WEIGHT = _row_value("kl_weight")
CE_WEIGHT = _row_value("ce_weight")
GRADIENT_CONSTANT = _row_value("gradient_constant")


@triton.jit
def _finite(peak):
    """Return the maximum, or 0 for the maximum over no column (-inf), because inf - inf is NaN."""
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def _over_ranks(tables, row, num_rows, ranks, MAX: tl.constexpr, SUM: tl.constexpr, RANKS: tl.constexpr):
    """Return maximum and sum of a softmax over all ranks, and each rank's scale [RANKS].

    tables: the ranks' statistics [ranks, num_rows, 7].
    """
    rank = tl.arange(0, RANKS)
    table = tables + (rank * num_rows + row) * NUM_STATISTICS
    peaks = tl.load(table + MAX, mask=rank < ranks, other=-float("inf"))
    peak = tl.max(peaks, 0)
    scale = tl.exp(peaks - _finite(peak))
    sums = tl.load(table + SUM, mask=rank < ranks, other=0.0)
    return peak, tl.sum(sums * scale, 0), scale


@triton.jit
def _of_ranks(table, row, num_rows, ranks, WIDTH: tl.constexpr, FIELD: tl.constexpr, RANKS: tl.constexpr):
    """Return the numbers of all ranks [RANKS] in one field of a table [ranks, num_rows, WIDTH]."""
    rank = tl.arange(0, RANKS)
    return tl.load(table + (rank * num_rows + row) * WIDTH + FIELD, mask=rank < ranks, other=0.0)


@triton.jit
def _row_values(
    tables,
    second_sums,
    token_weights,
    top_log_probs,
    top_log_ghost,
    values,
    losses,
    losses_stride,
    num_rows,
    ranks,
    k,
    t,
    kl_weight,
    ce_weight,
    TEACHER: tl.constexpr,
    TOP: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    peak_s, sum_s, scale_s = _over_ranks(tables, row, num_rows, ranks, STUDENT_MAX, STUDENT_SUM, RANKS)
    lse_s = peak_s + tl.log(sum_s)
    peak_t, sum_t, scale_t = _over_ranks(tables, row, num_rows, ranks, TEACHER_MAX, TEACHER_SUM, RANKS)
    lse_t = peak_t + tl.log(sum_t)
    sums_t1 = _of_ranks(tables, row, num_rows, ranks, NUM_STATISTICS, STUDENT_SUM_T1, RANKS)
    peaks = _of_ranks(tables, row, num_rows, ranks, NUM_STATISTICS, STUDENT_MAX, RANKS)
    lse_t1 = peak_s * t + tl.log(tl.sum(sums_t1 * tl.exp((peaks - _finite(peak_s)) * t), 0))
    label_logits = _of_ranks(tables, row, num_rows, ranks, NUM_STATISTICS, LABEL_LOGIT, RANKS)
    ce = lse_t1 - tl.sum(label_logits, 0)
    cross = _of_ranks(tables, row, num_rows, ranks, NUM_STATISTICS, CROSS_SUM, RANKS)
    # Teacher's lse - student's lse, computed without a difference of large numbers.
    lse_gap = (peak_t - peak_s) + (tl.log(sum_t) - tl.log(sum_s))
    divergence = 0.0
    constant = 0.0
    if TEACHER:
        if DIVERGENCE == "forward_kl":
            divergence = tl.sum(cross * scale_t, 0) / sum_t - lse_gap
        if DIVERGENCE == "reverse_kl":
            divergence = tl.sum(cross * scale_s, 0) / sum_s + lse_gap
            constant = divergence
        if DIVERGENCE == "skewed_forward_kl":
            divergence = _second_sum(second_sums, row, num_rows, ranks, 0, RANKS)
            constant = _second_sum(second_sums, row, num_rows, ranks, 1, RANKS)
            constant = constant / _second_sum(second_sums, row, num_rows, ranks, 2, RANKS)
        if DIVERGENCE == "js":
            constant = _second_sum(second_sums, row, num_rows, ranks, 1, RANKS)
            divergence = 0.5 * (_second_sum(second_sums, row, num_rows, ranks, 0, RANKS) + constant)
    if TOP:
        entropy = tl.zeros((BLOCK,), tl.float32)
        total_p = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, k, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            log_p = tl.load(top_log_probs + row * k + entry, mask=entry < k, other=-float("inf"))
            p = tl.exp(log_p)
            entropy += tl.where(p > 0, p * log_p, 0.0)
            total_p += p
        log_ghost = tl.load(top_log_ghost + row)
        constant = tl.exp(log_ghost)
        ghost = tl.where(lse_t > -float("inf"), constant * (log_ghost - lse_t + lse_s), 0.0)
        ghost = tl.where(log_ghost > -float("inf"), ghost, 0.0)
        divergence = tl.sum(entropy, 0) - tl.sum(cross, 0) + tl.sum(total_p, 0) * lse_s + ghost
    weight = tl.load(token_weights + row)
    values += row * NUM_VALUES
    tl.store(values + STUDENT_LSE, lse_s)
    tl.store(values + TEACHER_LSE, lse_t)
    tl.store(values + STUDENT_LSE_T1, lse_t1)
    tl.store(values + KL_WEIGHT, weight * kl_weight * t)
    tl.store(values + CE_WEIGHT, weight * ce_weight)
    tl.store(values + GRADIENT_CONSTANT, constant)
    tl.store(losses + row, kl_weight * t * t * divergence + ce_weight * ce)
    tl.store(losses + losses_stride + row, divergence)
    tl.store(losses + 2 * losses_stride + row, ce)


@triton.jit
def _second_sum(second_sums, row, num_rows, ranks, FIELD: tl.constexpr, RANKS: tl.constexpr):
    """Return the sum over all ranks of one second sum of a row."""
    return tl.sum(_of_ranks(second_sums, row, num_rows, ranks, NUM_SECOND_SUMS, FIELD, RANKS), 0)


@triton.jit
def _take_top(z_s, top_columns, top_logits, stride_s, valid, k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z_s += row * stride_s
    for start in range(0, k, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        column = tl.load(top_columns + row * k + entry, mask=entry < k, other=-1)
        is_here = (column >= 0) & (column < valid)
        z = tl.load(z_s + column, mask=is_here, other=-float("inf")).to(tl.float32)
        tl.store(top_logits + row * k + entry, z, mask=entry < k)
        tl.store(z_s + column, -float("inf"), mask=is_here)


@triton.jit
def _put_top(
    out,
    values,
    labels,
    top_columns,
    top_logits,
    top_log_probs,
    stride_out,
    valid,
    k,
    inverse_t,
    CE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    out += row * stride_out
    values += row * NUM_VALUES
    w_kl = tl.load(values + KL_WEIGHT)
    w_ce = tl.load(values + CE_WEIGHT)
    weighted = tl.where(w_kl != 0, 1, tl.where(w_ce != 0, 1, 0))
    for start in range(0, k, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        column = tl.load(top_columns + row * k + entry, mask=entry < k, other=-1)
        raw = tl.load(top_logits + row * k + entry, mask=entry < k, other=0.0)
        log_p = tl.load(top_log_probs + row * k + entry, mask=entry < k, other=-float("inf"))
        total = w_kl * (tl.exp(raw * inverse_t - tl.load(values + STUDENT_LSE)) - tl.exp(log_p))
        if CE:
            q = tl.exp(raw - tl.load(values + STUDENT_LSE_T1))
            total += w_ce * (q - tl.where(column == tl.load(labels + row), 1.0, 0.0))
        total = tl.where(entry < k * weighted, total, 0.0)
        is_here = (column >= 0) & (column < valid)
        tl.store(out + column, total.to(out.dtype.element_ty), mask=is_here)
