"""The row functions of rows.py as Triton kernels, for CUDA: the same arguments and results, and no float32 copy of the logits.
And the distance of hidden states that the importance of layers rests on, for the same reason.

z_s, z_t  logits of student and teacher [n, v/tp], float32 or bf16, rows contiguous at any stride; columns from `valid` on are padding

A row's work is a few operations for each byte, so time is that of reading: z_s and z_t once for the statistics (Jensen-Shannon:
twice), once more for the gradient, which is written once and may take the place of z_s. At hidden sizes of 4096 and 5120 the bytes
take a sixth of the time of the matrix products around them with float32 logits, a tenth with bf16 (arithmetic for an H100).

statistics  one program a row. Each lane keeps a maximum and sums of its own over the columns BLOCK apart, rescaled when its maximum
            grows (online softmax, 1805.02867), so that the loop has no step across lanes; these are joined once, after it.
gradient    one program for BLOCK columns of a row; it reads them before it writes them.

Nothing here waits for the device. The statistics of a row with not-a-number are unspecified; its gradient is 0 when it has no weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitron_mp.losses.reference import STATISTICS

BLOCK, WARPS = 2048, 8
"""Eight columns a thread: 16 bytes of bf16 in one load, and 64 registers, so four rows at a time on a multiprocessor (sm_90)."""

LOG_2 = tl.constexpr(math.log(2))


def statistics(
    z_s: Tensor, z_t: Tensor | None, labels: Tensor, valid: int, t: float, divergence: str
) -> tuple[Tensor, Any]:
    """As rows.statistics; keeps nothing."""
    stats = torch.empty((len(z_s), STATISTICS), dtype=torch.float32, device=z_s.device)
    teacher = z_s if z_t is None else z_t
    chosen = {
        "HOT": t != 1,
        "TEACHER": z_t is not None,
        "DIVERGENCE": divergence,
        "BLOCK": _block(z_s),
        "num_warps": WARPS,
    }
    _statistics[(len(z_s),)](
        z_s, teacher, labels.contiguous(), stats, *_sizes(z_s, teacher), valid, t, 1 / t, STATISTICS, **chosen
    )
    return stats, None


def js_sums(z_s: Tensor, z_t: Tensor, lse_s: Tensor, lse_t: Tensor, valid: int, t: float) -> Tensor:
    """As rows.js_sums."""
    sums = torch.empty((len(z_s), 2), dtype=torch.float32, device=z_s.device)
    lse_s, lse_t = lse_s.contiguous(), lse_t.contiguous()
    _js_sums[(len(z_s),)](
        z_s, z_t, lse_s, lse_t, sums, *_sizes(z_s, z_t), valid, 1 / t, BLOCK=_block(z_s), num_warps=WARPS
    )
    return sums


def gradient(
    z_s: Tensor,
    z_t: Tensor | None,
    stats: Tensor,
    kept: Any,
    rows: Tensor,
    labels: Tensor,
    valid: int,
    t: float,
    divergence: str,
    has_ce: bool,
    out: Tensor,
) -> None:
    """As rows.gradient. out may be z_s itself."""
    teacher, block = z_s if z_t is None else z_t, _block(out)
    chosen = {
        "HOT": t != 1,
        "TEACHER": z_t is not None,
        "CE": has_ce,
        "DIVERGENCE": divergence,
        "BLOCK": block,
        "num_warps": WARPS,
    }
    grid, sizes = (len(out), triton.cdiv(out.shape[1], block)), _sizes(z_s, teacher)
    _gradient[grid](
        z_s,
        teacher,
        out,
        rows.contiguous(),
        labels.contiguous(),
        *sizes,
        _stride(out),
        valid,
        1 / t,
        **chosen,
    )


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """[n, h] twice, float32 or bf16, h side by side -> [n] float32: 1 - cosine of each pair of rows. Each is read once: torch makes float32 copies,
    and as many passes over them as there are operations."""
    found = torch.empty(len(a), dtype=torch.float32, device=a.device)
    _cosine_distance[(len(a),)](
        a, b, found, _stride(a), _stride(b), a.shape[1], BLOCK=_block(a), num_warps=WARPS
    )
    return found


def _block(z: Tensor) -> int:
    return min(BLOCK, triton.next_power_of_2(z.shape[1]))


def _sizes(z_s: Tensor, z_t: Tensor) -> tuple[int, int, int, int]:
    """Loads end at the padded width: a compiler that knows it for a multiple of 16 takes 16 bytes at a time, whatever the vocabulary."""
    return _stride(z_s), _stride(z_t), z_s.shape[1], z_t.shape[1]


def _stride(z: Tensor) -> int:
    assert z.stride(1) == 1, "the columns of a row must lie side by side"
    return z.stride(0)


@triton.jit
def _statistics(
    z_s,
    z_t,
    labels,
    stats,
    stride_s,
    stride_t,
    columns_s,
    columns_t,
    valid,
    t,
    inverse_t,
    WIDTH: tl.constexpr,
    HOT: tl.constexpr,
    TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_s += row * stride_s
    z_t += row * stride_t
    stats += row * WIDTH
    lane = tl.arange(0, BLOCK)
    top_s = tl.full((BLOCK,), -float("inf"), tl.float32)
    top_t = tl.full((BLOCK,), -float("inf"), tl.float32)
    sum_s = tl.zeros((BLOCK,), tl.float32)
    sum_1 = tl.zeros((BLOCK,), tl.float32)
    sum_t = tl.zeros((BLOCK,), tl.float32)
    cross = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, valid, BLOCK):
        place = start + lane
        inside = place < valid
        s = tl.where(
            inside,
            tl.load(z_s + place, mask=place < columns_s, other=0.0).to(tl.float32) * inverse_t,
            -float("inf"),
        )
        new_s = tl.maximum(top_s, s)
        centre_s = _finite(new_s)
        old_s = tl.exp(top_s - centre_s)
        e_s = tl.exp(s - centre_s)
        sum_s = sum_s * old_s + e_s
        if HOT:
            sum_1 = sum_1 * tl.exp((top_s - centre_s) * t) + tl.exp((s - centre_s) * t)
        if TEACHER:
            u = tl.where(
                inside,
                tl.load(z_t + place, mask=place < columns_t, other=0.0).to(tl.float32) * inverse_t,
                -float("inf"),
            )
            new_t = tl.maximum(top_t, u)
            centre_t = _finite(new_t)
            old_t = tl.exp(top_t - centre_t)
            e_t = tl.exp(u - centre_t)
            sum_t = sum_t * old_t + e_t
            if DIVERGENCE == "forward_kl":
                cross = cross * old_t + tl.where(inside, e_t * (u - s), 0.0)
            if DIVERGENCE == "reverse_kl":
                cross = cross * old_s + tl.where(inside, e_s * (s - u), 0.0)
            top_t = new_t
        top_s = new_s

    peak_s = tl.max(top_s, 0)
    scale_s = tl.exp(top_s - _finite(peak_s))
    total_s = tl.sum(sum_s * scale_s, 0)
    label = tl.load(labels + row)
    mine = (label >= 0) & (label < valid)
    tl.store(stats, peak_s)
    tl.store(stats + 1, total_s)
    if HOT:
        tl.store(stats + 2, tl.sum(sum_1 * tl.exp((top_s - _finite(peak_s)) * t), 0))
    else:
        tl.store(stats + 2, total_s)
    tl.store(stats + 3, tl.load(z_s + label, mask=mine, other=0.0).to(tl.float32))
    if TEACHER:
        peak_t = tl.max(top_t, 0)
        scale_t = tl.exp(top_t - _finite(peak_t))
        tl.store(stats + 4, peak_t)
        tl.store(stats + 5, tl.sum(sum_t * scale_t, 0))
        if DIVERGENCE == "reverse_kl":
            scale_t = scale_s
        tl.store(stats + 6, tl.sum(cross * scale_t, 0))
    else:
        tl.store(stats + 4, 0.0)
        tl.store(stats + 5, 0.0)
        tl.store(stats + 6, 0.0)


@triton.jit
def _finite(peak):
    """What to subtract: a maximum, or 0 where it is one over nothing, since inf - inf is not a number."""
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def _js_sums(
    z_s,
    z_t,
    lse_s,
    lse_t,
    sums,
    stride_s,
    stride_t,
    columns_s,
    columns_t,
    valid,
    inverse_t,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_s += row * stride_s
    z_t += row * stride_t
    lane = tl.arange(0, BLOCK)
    row_s = tl.load(lse_s + row)
    row_t = tl.load(lse_t + row)
    of_p = tl.zeros((BLOCK,), tl.float32)
    of_q = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, valid, BLOCK):
        place = start + lane
        inside = place < valid
        log_q = tl.load(z_s + place, mask=place < columns_s, other=0.0).to(tl.float32) * inverse_t - row_s
        log_p = tl.load(z_t + place, mask=place < columns_t, other=0.0).to(tl.float32) * inverse_t - row_t
        log_m = _log_mean(log_q, log_p)
        of_p += tl.where(inside, tl.exp(log_p) * (log_p - log_m), 0.0)
        of_q += tl.where(inside, tl.exp(log_q) * (log_q - log_m), 0.0)
    tl.store(sums + row * 2, tl.sum(of_p, 0))
    tl.store(sums + row * 2 + 1, tl.sum(of_q, 0))


@triton.jit
def _log_mean(a, b):
    """log((e^a + e^b) / 2)."""
    return tl.maximum(a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b))) - LOG_2


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
    HOT: tl.constexpr,
    TEACHER: tl.constexpr,
    CE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows += row * 6
    lse_s = tl.load(rows)
    lse_t = tl.load(rows + 1)
    w_kl = tl.load(rows + 3)
    w_ce = tl.load(rows + 4)
    weighted = tl.where(
        w_kl != 0, 1, tl.where(w_ce != 0, 1, 0)
    )  # a row without weight is not read: it may hold not-a-number
    raw = tl.load(z_s + row * stride_s + place, mask=place < columns_s * weighted, other=0.0).to(tl.float32)
    log_q = raw * inverse_t - lse_s
    q = tl.exp(log_q)
    total = tl.zeros((BLOCK,), tl.float32)
    if TEACHER:
        log_p = (
            tl.load(z_t + row * stride_t + place, mask=place < columns_t * weighted, other=0.0).to(tl.float32)
            * inverse_t
            - lse_t
        )
        if DIVERGENCE == "forward_kl":
            total = w_kl * (q - tl.exp(log_p))
        if DIVERGENCE == "reverse_kl":
            total = w_kl * (q * (log_q - log_p - tl.load(rows + 5)))
        if DIVERGENCE == "js":
            total = 0.5 * w_kl * (q * (log_q - _log_mean(log_q, log_p) - tl.load(rows + 5)))
    if CE:
        if HOT:
            q = tl.exp(raw - tl.load(rows + 2))
        total += w_ce * (q - tl.where(place == tl.load(labels + row), 1.0, 0.0))
    total = tl.where(place < valid * weighted, total, 0.0)
    tl.store(out + row * stride_out + place, total.to(out.dtype.element_ty), mask=place < columns_s)


@triton.jit
def _cosine_distance(a, b, out, stride_a, stride_b, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    a += row * stride_a
    b += row * stride_b
    lane = tl.arange(0, BLOCK)
    product = tl.zeros((BLOCK,), tl.float32)
    square_a = tl.zeros((BLOCK,), tl.float32)
    square_b = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        place = start + lane
        x = tl.load(a + place, mask=place < columns, other=0.0).to(tl.float32)
        y = tl.load(b + place, mask=place < columns, other=0.0).to(tl.float32)
        product += x * y
        square_a += x * x
        square_b += y * y
    # Norms are at least 1e-8, as in torch.cosine_similarity.
    norms = tl.sqrt(tl.maximum(tl.sum(square_a, 0), 1e-16)) * tl.sqrt(tl.maximum(tl.sum(square_b, 0), 1e-16))
    tl.store(out + row, 1.0 - tl.sum(product, 0) / norms)
