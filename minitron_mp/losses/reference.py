"""Row functions of the distillation loss in plain torch: what a CPU runs, and the reference of kernels.py, which has the same three.

z_s, z_t  logits of student and teacher [n, v/tp], float32 or bf16; columns from `valid` on are padding
labels    int64 [n], numbered from this rank's first column; one outside of [0, valid) is another rank's
t         temperature; s = z_s / t, u = z_t / t
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

STATISTICS = 7


def statistics(
    z_s: Tensor, z_t: Tensor | None, labels: Tensor, valid: int, t: float, divergence: str
) -> tuple[Tensor, Any]:
    """What a row's loss needs of this rank's columns, float32 [n, STATISTICS], and what gradient() may use again:

    0 max s                     1 sum e^(s - max s)      2 sum e^(z_s - max z_s)     3 z_s of the label, 0 when it is another rank's
    4 max u                     5 sum e^(u - max u)      6 forward_kl: sum e^(u - max u) (u - s); reverse_kl: sum e^(s - max s) (s - u)

    A maximum over no column is -inf, other sums over none are 0; 4 to 6 are 0 without a teacher.
    """
    stats = z_s.new_zeros((len(z_s), STATISTICS), dtype=torch.float32)
    if valid == 0:
        stats[:, 0] = -torch.inf
        stats[:, 4] = 0.0 if z_t is None else -torch.inf
        return stats, None
    mine = (labels >= 0) & (labels < valid)
    stats[:, 3] = torch.where(mine, z_s.gather(1, labels.clamp(0, valid - 1)[:, None])[:, 0].float(), 0.0)
    s, peak_s = _centred(z_s, valid, t)
    e_s = torch.exp(s)
    stats[:, 0], stats[:, 1] = peak_s[:, 0], e_s.sum(1)
    stats[:, 2] = torch.exp(s * t).sum(1) if t != 1 else stats[:, 1]
    if z_t is None:
        return stats, (e_s, None)
    u, peak_t = _centred(z_t, valid, t)
    e_t = torch.exp(u)
    stats[:, 4], stats[:, 5] = peak_t[:, 0], e_t.sum(1)
    if divergence == "forward_kl":
        stats[:, 6] = u.sub_(s).mul_(e_t).sum(1) + (peak_t - peak_s)[:, 0] * stats[:, 5]
    elif divergence == "reverse_kl":
        stats[:, 6] = s.sub_(u).mul_(e_s).sum(1) + (peak_s - peak_t)[:, 0] * stats[:, 1]
    return stats, (e_s, e_t)


def js_sums(z_s: Tensor, z_t: Tensor, lse_s: Tensor, lse_t: Tensor, valid: int, t: float) -> Tensor:
    """This rank's part of KL(p || m) and KL(q || m), m = (p + q) / 2, float32 [n, 2]."""
    log_q, log_p, log_m = _log_mixture(z_s, z_t, lse_s, lse_t, valid, t)
    return torch.stack([(log_p.exp() * (log_p - log_m)).sum(1), (log_q.exp() * (log_q - log_m)).sum(1)], 1)


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
    """Write the gradient of the weighted loss by z_s into out [n, v/tp], any float dtype; 0 in the padding and in rows without weight.

    stats, kept: of statistics(), of this rank. rows float32 [n, 6]: log of sum e^s, e^u, e^z_s over the whole vocabulary; weight of
    the divergence (its factor t included) and of the cross-entropy (has_ce: whether it has any); reverse_kl: the divergence, js:
    KL(q || m).
    """
    if valid == 0:
        out.zero_()
        return
    lse_s, lse_t, lse_1, w_kl, w_ce, extra = rows[:, :, None].unbind(1)
    ce_done = False
    if z_t is None or divergence == "forward_kl":
        e_s, e_t = kept  # e^(s - its local maximum): a factor a row makes probabilities of them
        factor = w_kl * torch.exp(stats[:, :1] - lse_s)
        if ce_done := t == 1 and has_ce:
            factor = factor + w_ce * torch.exp(stats[:, :1] - lse_1)
        total = e_s.mul_(factor)
        if e_t is not None:
            total.addcmul_(e_t, w_kl * torch.exp(stats[:, 4:5] - lse_t), value=-1)
    elif divergence == "reverse_kl":
        log_q = z_s[:, :valid].float() / t - lse_s
        total = log_q.exp() * (log_q - (z_t[:, :valid].float() / t - lse_t) - extra) * w_kl
    else:
        log_q, _, log_m = _log_mixture(z_s, z_t, lse_s[:, 0], lse_t[:, 0], valid, t)
        total = log_q.exp() * (log_q - log_m - extra) * (w_kl / 2)
    if has_ce and not ce_done:
        total += torch.exp(z_s[:, :valid].float() - lse_1) * w_ce
    write(total, rows, labels, valid, has_ce, out)


def write(total: Tensor, rows: Tensor, labels: Tensor, valid: int, has_ce: bool, out: Tensor) -> None:
    """Take the label's 1 off total [n, valid], which has the probabilities, and put it into out [n, v/tp]."""
    w_kl, w_ce = rows[:, 3:4], rows[:, 4:5]
    if has_ce:
        mine = (labels >= 0) & (labels < valid)
        total.scatter_add_(1, labels.clamp(0, valid - 1)[:, None], -w_ce * mine[:, None])
    out[:, :valid] = total
    out[:, valid:] = 0
    out.masked_fill_((w_kl == 0) & (w_ce == 0), 0.0)  # a row without weight may hold NaN


def _centred(z: Tensor, valid: int, t: float) -> tuple[Tensor, Tensor]:
    """z / t minus its maximum, a new float32 [n, valid], and the maximum [n, 1]."""
    z = z[:, :valid]
    peak = z.amax(1, keepdim=True).float()
    centred = z.float() - peak if z.dtype == torch.float32 else z.float().sub_(peak)
    return (centred.div_(t), peak / t) if t != 1 else (centred, peak)


def _log_mixture(
    z_s: Tensor, z_t: Tensor, lse_s: Tensor, lse_t: Tensor, valid: int, t: float
) -> tuple[Tensor, Tensor, Tensor]:
    """log q, log p and log((p + q) / 2), float32 [n, valid]."""
    log_q, log_p = z_s[:, :valid].float() / t - lse_s[:, None], z_t[:, :valid].float() / t - lse_t[:, None]
    return log_q, log_p, torch.logaddexp(log_q, log_p) - math.log(2)
