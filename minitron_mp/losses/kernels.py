"""Triton kernels of the distillation loss for CUDA. kernel_calls.py starts them.

They make no float32 copy of the logits.

In the kernels z_s and z_t are the logits of student and teacher, and DIVERGENCE is a name of
divergences.py.

The kernels are bound by memory bandwidth. They read z_s and z_t once for the statistics, once for
the second sums of a divergence that has them, and once for the gradient. They write the gradient
once; it may overwrite z_s. At hidden sizes of 4096 and 5120 this takes a sixth of the time of the
matrix products around it with float32 logits, and a tenth with bf16 logits (calculated for an H100).

statistics   One program per row. Each lane keeps a maximum and sums over columns that are BLOCK
             apart, and rescales them when its maximum grows (online softmax, 1805.02867). So the
             loop has no step across lanes. The lanes are combined once, after the loop.
second_sums  One program per row, over the same columns.
row_values   One program per row. It combines the statistics of all tensor-parallel ranks and computes
             the loss of the row, and what its gradient needs.
gradient     One program per BLOCK columns of a row. It reads the columns before it writes them.
take_top     One program per row, for a top-k teacher. It moves the logits of the k tokens to a table
             of their own and leaves -inf, so that statistics() sums the remaining tokens alone.
put_top      One program per row. It writes the gradient of the k tokens.

A tile of rows needs three kernels, four with second sums, and five with a top-k teacher. The
collectives come between them.

The statistics of a row with NaN are unspecified. The gradient of such a row is 0 when the row has no
weight.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from minitron_mp.losses.rows import RowStatistics, RowValues

LOG_2 = tl.constexpr(math.log(2))


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
def _statistics(
    z_s,
    z_t,
    labels,
    top_columns,
    top_logits,
    top_log_probs,
    stats,
    stride_s,
    stride_t,
    columns_s,
    columns_t,
    valid,
    k,
    t,
    inverse_t,
    HOT: tl.constexpr,
    TEACHER: tl.constexpr,
    TOP: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_s += row * stride_s
    z_t += row * stride_t
    stats += row * NUM_STATISTICS
    lane = tl.arange(0, BLOCK)
    top_s = tl.full((BLOCK,), -float("inf"), tl.float32)
    top_t = tl.full((BLOCK,), -float("inf"), tl.float32)
    sum_s = tl.zeros((BLOCK,), tl.float32)
    sum_1 = tl.zeros((BLOCK,), tl.float32)
    sum_t = tl.zeros((BLOCK,), tl.float32)
    cross = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, valid, BLOCK):
        column = start + lane
        inside = column < valid
        s = tl.where(inside, _load(z_s, column, columns_s) * inverse_t, -float("inf"))
        new_s, centre_s, old_s, e_s = _with_maximum(top_s, s)
        sum_s = sum_s * old_s + e_s
        if HOT:
            sum_1 = sum_1 * tl.exp((top_s - centre_s) * t) + tl.exp((s - centre_s) * t)
        if TEACHER:
            u = tl.where(inside, _load(z_t, column, columns_t) * inverse_t, -float("inf"))
            new_t, _, old_t, e_t = _with_maximum(top_t, u)
            sum_t = sum_t * old_t + e_t
            if DIVERGENCE == "forward_kl":
                cross = cross * old_t + tl.where(inside, e_t * (u - s), 0.0)
            if DIVERGENCE == "reverse_kl":
                cross = cross * old_s + tl.where(inside, e_s * (s - u), 0.0)
            top_t = new_t
        top_s = new_s

    label = tl.load(labels + row)
    is_here = (label >= 0) & (label < valid)
    label_logit = tl.load(z_s + label, mask=is_here, other=0.0).to(tl.float32)
    if TOP:  # so far the sums are those of the remaining tokens
        peak_t = tl.max(top_s, 0)
        tl.store(stats + TEACHER_MAX, peak_t)
        tl.store(stats + TEACHER_SUM, tl.sum(sum_s * tl.exp(top_s - _finite(peak_t)), 0))
        for start in range(0, k, BLOCK):
            entry = start + lane
            raw = tl.load(top_logits + row * k + entry, mask=entry < k, other=-float("inf"))
            column = tl.load(top_columns + row * k + entry, mask=entry < k, other=-1)
            log_p = tl.load(top_log_probs + row * k + entry, mask=entry < k, other=-float("inf"))
            s = raw * inverse_t
            new_s, centre_s, old_s, e_s = _with_maximum(top_s, s)
            sum_s = sum_s * old_s + e_s
            if HOT:
                sum_1 = sum_1 * tl.exp((top_s - centre_s) * t) + tl.exp((s - centre_s) * t)
            cross += tl.where(s > -float("inf"), tl.exp(log_p) * s, 0.0)
            is_label = column == label
            label_logit = tl.where(
                tl.max(is_label.to(tl.int32), 0) > 0, tl.sum(tl.where(is_label, raw, 0.0), 0), label_logit
            )
            top_s = new_s
        label_logit = tl.where(is_here, label_logit, 0.0)

    peak_s = tl.max(top_s, 0)
    scale_s = tl.exp(top_s - _finite(peak_s))
    total_s = tl.sum(sum_s * scale_s, 0)
    tl.store(stats + STUDENT_MAX, peak_s)
    tl.store(stats + STUDENT_SUM, total_s)
    if HOT:
        tl.store(stats + STUDENT_SUM_T1, tl.sum(sum_1 * tl.exp((top_s - _finite(peak_s)) * t), 0))
    else:
        tl.store(stats + STUDENT_SUM_T1, total_s)
    tl.store(stats + LABEL_LOGIT, label_logit)
    if TEACHER:
        peak_t = tl.max(top_t, 0)
        scale_t = tl.exp(top_t - _finite(peak_t))
        tl.store(stats + TEACHER_MAX, peak_t)
        tl.store(stats + TEACHER_SUM, tl.sum(sum_t * scale_t, 0))
        if DIVERGENCE == "reverse_kl":
            scale_t = scale_s
        tl.store(stats + CROSS_SUM, tl.sum(cross * scale_t, 0))
    elif TOP:
        tl.store(stats + CROSS_SUM, tl.sum(cross, 0))
    else:
        tl.store(stats + TEACHER_MAX, 0.0)
        tl.store(stats + TEACHER_SUM, 0.0)
        tl.store(stats + CROSS_SUM, 0.0)


@triton.jit
def _load(z, column, columns):
    """Return logits of a row in float32, 0 from the padded width on."""
    return tl.load(z + column, mask=column < columns, other=0.0).to(tl.float32)


@triton.jit
def _with_maximum(top, z):
    """Return what one step of the online softmax needs when z follows logits of maximum `top`.

    These are the new maximum, the same maximum or 0 if it is -inf, the factor of earlier sums, and
    the exponentials of z.
    """
    peak = tl.maximum(top, z)
    centre = _finite(peak)
    return peak, centre, tl.exp(top - centre), tl.exp(z - centre)


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
def _second_sums(
    z_s,
    z_t,
    tables,
    sums,
    stride_s,
    stride_t,
    columns_s,
    columns_t,
    valid,
    num_rows,
    ranks,
    inverse_t,
    skew,
    DIVERGENCE: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_s += row * stride_s
    z_t += row * stride_t
    lane = tl.arange(0, BLOCK)
    peak_s, sum_s, _ = _over_ranks(tables, row, num_rows, ranks, STUDENT_MAX, STUDENT_SUM, RANKS)
    peak_t, sum_t, _ = _over_ranks(tables, row, num_rows, ranks, TEACHER_MAX, TEACHER_SUM, RANKS)
    row_s = peak_s + tl.log(sum_s)
    row_t = peak_t + tl.log(sum_t)
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    third = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, valid, BLOCK):
        column = start + lane
        inside = column < valid
        log_q = _load(z_s, column, columns_s) * inverse_t - row_s
        log_p = _load(z_t, column, columns_t) * inverse_t - row_t
        if DIVERGENCE == "skewed_forward_kl":
            log_m = _log_skewed(log_p, log_q, skew)
            p = tl.exp(log_p)
            q = tl.exp(log_q)
            divergence = p * (log_p - log_m) + (1.0 - skew) * (q - p)
            ratio = tl.exp(log_p - log_m) - tl.exp(log_q - log_m)
            first += tl.where(inside, divergence, 0.0)
            second += tl.where(inside, (1.0 - skew) * (1.0 - skew) * q * ratio, 0.0)
            third += tl.where(inside, q, 0.0)
        if DIVERGENCE == "js":
            log_m = _log_mean(log_q, log_p)
            first += tl.where(inside, tl.exp(log_p) * (log_p - log_m), 0.0)
            second += tl.where(inside, tl.exp(log_q) * (log_q - log_m), 0.0)
    tl.store(sums + row * NUM_SECOND_SUMS, tl.sum(first, 0))
    tl.store(sums + row * NUM_SECOND_SUMS + 1, tl.sum(second, 0))
    tl.store(sums + row * NUM_SECOND_SUMS + 2, tl.sum(third, 0))


@triton.jit
def _log_mean(a, b):
    """Return log((e^a + e^b) / 2)."""
    return _log_add(a, b) - LOG_2


@triton.jit
def _log_skewed(a, b, skew):
    """Return log(skew e^a + (1 - skew) e^b)."""
    return _log_add(a + tl.log(skew), b + tl.log(1.0 - skew))


@triton.jit
def _log_add(a, b):
    """Return log(e^a + e^b)."""
    return tl.maximum(a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b)))


@triton.jit
def _gradient(
    z_s,
    z_t,
    out,
    rows,
    labels,
    stride_s,
    stride_t,
    columns_s,
    columns_t,
    stride_out,
    valid,
    inverse_t,
    skew,
    HOT: tl.constexpr,
    TEACHER: tl.constexpr,
    TOP: tl.constexpr,
    CE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows += row * NUM_VALUES
    lse_s = tl.load(rows + STUDENT_LSE)
    lse_t = tl.load(rows + TEACHER_LSE)
    w_kl = tl.load(rows + KL_WEIGHT)
    w_ce = tl.load(rows + CE_WEIGHT)
    # A row without weight is not read, because it may contain NaN.
    weighted = tl.where(w_kl != 0, 1, tl.where(w_ce != 0, 1, 0))
    raw = _load(z_s + row * stride_s, column, columns_s * weighted)
    log_q = raw * inverse_t - lse_s
    q = tl.exp(log_q)
    total = tl.zeros((BLOCK,), tl.float32)
    if TEACHER:
        log_p = _load(z_t + row * stride_t, column, columns_t * weighted) * inverse_t - lse_t
        if DIVERGENCE == "forward_kl":
            total = w_kl * (q - tl.exp(log_p))
        if DIVERGENCE == "reverse_kl":
            total = w_kl * (q * (log_q - log_p - tl.load(rows + GRADIENT_CONSTANT)))
        if DIVERGENCE == "skewed_forward_kl":
            log_m = _log_skewed(log_p, log_q, skew)
            ratio = tl.exp(log_p - log_m) - tl.exp(log_q - log_m)
            total = w_kl * (q * (tl.load(rows + GRADIENT_CONSTANT) - (1.0 - skew) * (1.0 - skew) * ratio))
        if DIVERGENCE == "js":
            total = 0.5 * w_kl * (q * (log_q - _log_mean(log_q, log_p) - tl.load(rows + GRADIENT_CONSTANT)))
    if TOP:  # the k tokens have logits of -inf here; put_top() writes their gradients
        remaining_softmax = tl.where(log_q > -float("inf"), tl.exp(raw * inverse_t - lse_t), 0.0)
        total = w_kl * (q - remaining_softmax * tl.load(rows + GRADIENT_CONSTANT))
    if CE:
        if HOT:
            q = tl.exp(raw - tl.load(rows + STUDENT_LSE_T1))
        total += w_ce * (q - tl.where(column == tl.load(labels + row), 1.0, 0.0))
    total = tl.where(column < valid * weighted, total, 0.0)
    tl.store(out + row * stride_out + column, total.to(out.dtype.element_ty), mask=column < columns_s)


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
