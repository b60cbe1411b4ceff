"""Triton kernels of the distillation loss that read logits. kernel_calls.py starts them.

They make no float32 copy of the logits.

In the kernels z_s and z_t are the logits of student and teacher, and DIVERGENCE is a name of
divergences.py.

The kernels are bound by memory bandwidth. They read z_s and z_t once for the statistics, once for
the second sums of a divergence that has them, and once for the gradient. They write the gradient
once; it may overwrite z_s. At hidden sizes of 4096 and 5120 this takes an eighth of the time of the
matrix products around it with float32 logits, and a fifteenth with bf16 logits (estimated for an
H100, docs/loss_on_a_gpu.md).

statistics   One program per row. Each lane keeps a maximum and sums over columns that are BLOCK
             apart, and rescales them when its maximum grows (online softmax, 1805.02867). So the
             loop has no step across lanes. The lanes are combined once, after the loop.
second_sums  One program per row, over the same columns.
row_values   One program per row. It combines the statistics of all tensor-parallel ranks and computes
             the loss of the row, and what its gradient needs.
gradient     One program per BLOCK columns of a row. It reads the columns before it writes them.
take_top     One program per row, for a top-k teacher. It moves the logits of the k tokens to a
             separate table and leaves -inf, so that statistics() sums the remaining tokens alone.
put_top      One program per row. It writes the gradient of the k tokens.

row_values, take_top and put_top are in row_kernels.py. A tile of rows needs three kernels, four with
second sums, and five with a top-k teacher. The collectives come between them.

The statistics of a row with NaN are unspecified. The gradient of such a row is 0 when the row has no
weight.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from minitron_mp.losses.row_kernels import (
    CE_WEIGHT,
    CROSS_SUM,
    GRADIENT_CONSTANT,
    KL_WEIGHT,
    LABEL_LOGIT,
    NUM_SECOND_SUMS,
    NUM_STATISTICS,
    NUM_VALUES,
    STUDENT_LSE,
    STUDENT_LSE_T1,
    STUDENT_MAX,
    STUDENT_SUM,
    STUDENT_SUM_T1,
    TEACHER_LSE,
    TEACHER_MAX,
    TEACHER_SUM,
    _finite,
    _over_ranks,
)

LOG_2 = tl.constexpr(math.log(2))


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
