"""Vocab-parallel distillation loss on logits, exact, in plain torch.

    L = kl_weight T^2 KL(teacher || student) at temperature T  +  ce_weight CE(labels)         per token

The KL is forward: KL(teacher || student) (2407.14679 section 3, forward KLD). With z_s, z_t the logits over T and
m, d their max and sum of exp(z - m) over the whole vocabulary:

    KL = sum_v exp(z_t - m_t) (z_t - z_s) / d_t  -  lse_t + lse_s          dL/dz_s = w T (softmax(z_s) - softmax(z_t))

Each rank holds v/tp columns and needs only the row statistics of the others: one max and one sum all-reduce a chunk of rows,
never a gather of logits. The gradient is local and carries no factor of tp. Columns of the padded vocabulary take no part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Logits handled at a time, in elements: float32 temporaries stay at 16 MB each, below what malloc gives back to the system every time."""


def distillation_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    vocab_size: int,
    group: Any,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token (loss, kl, ce), float32 [s, b], equal on all ranks of the tensor parallel group.

    student, teacher: logits [s, b, v/tp] of this rank, any float dtype; teacher None (then kl is 0 and kl_weight must be 0).
    labels: int64 [s, b], below vocab_size. loss is differentiable in student (the gradient is in its dtype); kl carries no T^2,
    so that it compares between temperatures; kl and ce are for the log.
    """
    assert teacher is not None or not kl_weight
    settings = (vocab_size, group, temperature, kl_weight, ce_weight)
    loss, kl, ce = _DistillationLoss.apply(student, teacher, labels, settings)
    return loss, kl.detach(), ce.detach()


class _DistillationLoss(torch.autograd.Function):
    """Computes the gradient in the forward pass: the logits' statistics are in the cache then."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor | None, labels: Tensor, settings: tuple) -> tuple[Tensor, Tensor, Tensor]:
        rows = student.reshape(-1, student.shape[-1])
        teacher_rows = None if teacher is None else teacher.reshape(rows.shape)
        flat, gradient = labels.reshape(-1), torch.empty_like(rows) if student.requires_grad else None
        out = rows.new_empty((3, rows.shape[0]), dtype=torch.float32)
        chunk = max(1, CHUNK_ELEMENTS // rows.shape[1])
        for i in range(0, rows.shape[0], chunk):
            part = slice(i, i + chunk)
            out[:, part] = _chunk(
                rows[part], None if teacher_rows is None else teacher_rows[part], flat[part], None if gradient is None else gradient[part], *settings
            )
        ctx.gradient = None if gradient is None else gradient.view(student.shape)
        loss, kl, ce = out.view(3, *labels.shape)
        ctx.mark_non_differentiable(kl, ce)
        return loss, kl, ce

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad_loss[..., None].to(gradient.dtype)), None, None, None


def _chunk(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    gradient: Tensor | None,
    vocab_size: int,
    group: Any,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
) -> Tensor:
    """[3, n] (loss, kl, ce) of n rows [n, v/tp]; writes dloss/dstudent into `gradient` [n, v/tp]."""
    columns = student.shape[1]
    first = group.rank() * columns
    valid = max(0, min(columns, vocab_size - first))  # a rank may hold padding only
    local = labels - first
    mine = (local >= 0) & (local < valid)
    index = local.clamp(0, columns - 1)[:, None]

    z_s = student[:, :valid].float()
    label_logit = torch.where(mine, student.gather(1, index)[:, 0].float(), 0.0)
    logits = [z_s / temperature if temperature != 1 else z_s]
    if teacher is not None:
        z_t = teacher[:, :valid].float()
        logits.append(z_t / temperature if temperature != 1 else z_t)
    if temperature != 1:
        logits.append(z_s)  # the cross-entropy has no temperature
    own = 0 if temperature == 1 else -1  # the student without temperature
    peaks = torch.stack([z.amax(1) if valid else z.new_full((len(z),), -torch.inf) for z in logits])
    _all_reduce(peaks, dist.ReduceOp.MAX, group)
    exps = [torch.exp(z - peak[:, None]) for z, peak in zip(logits, peaks)]
    cross = [(exps[1] * (logits[1] - logits[0])).sum(1)] if teacher is not None else []
    sums = torch.stack([*(e.sum(1) for e in exps), label_logit, *cross])
    _all_reduce(sums, dist.ReduceOp.SUM, group)

    masses, label_logit = sums[: len(exps)], sums[len(exps)]
    lse = peaks + masses.log()
    kl = sums[-1] / masses[1] - lse[1] + lse[0] if teacher is not None else torch.zeros_like(label_logit)
    ce = lse[own] - label_logit
    if gradient is not None:
        probabilities = [e.div_(mass[:, None]) for e, mass in zip(exps, masses)]
        total = torch.zeros_like(z_s)
        if kl_weight:
            total.add_(probabilities[0], alpha=kl_weight * temperature).sub_(probabilities[1], alpha=kl_weight * temperature)
        if ce_weight and valid:
            total.add_(probabilities[own], alpha=ce_weight)
            total.scatter_add_(1, index.clamp(max=valid - 1), -ce_weight * mine[:, None].float())
        gradient[:, :valid] = total
        gradient[:, valid:] = 0
    return torch.stack([kl_weight * temperature**2 * kl + ce_weight * ce, kl, ce])


def _all_reduce(x: Tensor, op: Any, group: Any) -> None:
    if group.size() > 1:
        dist.all_reduce(x, op, group=group)
