"""The distillation loss from hidden states to gradients: exact, vocab-parallel, fused with both output layers, in chunks of tokens.

    L = sum_i w_i (kl_weight T^2 D(teacher, student)_i + ce_weight CE(labels)_i)         w_i token weights

    forward_kl  KL(teacher || student)    sum_v p (log p - log q)          dz = w T (q - p)
    reverse_kl  KL(student || teacher)    sum_v q (log q - log p)          dz = w T q (log q - log p - D)
    js          Jensen-Shannon            (KL(p || m) + KL(q || m)) / 2    dz = w T q (log(q / m) - KL(q || m)) / 2,  m = (p + q) / 2
    top k       forward KL over the k most likely tokens of the teacher and a ghost that holds the rest of the mass:
                dz = w T (q - p) on the k tokens, w T q (1 - p_ghost / q_ghost) on all others (q / q_ghost is their own softmax)

p, q are the softmax of the teacher's and student's logits over T; z the student's logits over T. Forward KL is the Minitron loss
(2407.14679 section 3); the gradients follow from d log q_v / d z_u = [u = v] - q_u.

The student's logits exist for one chunk of tokens at a time. The gradient is computed with the loss (recomputing the logits in
the backward pass would cost half as much again), so forward leaves dX, and adds dW to weight.main_grad when Megatron's wrapper
made one. Each rank holds v/tp columns; of the others it needs a few sums a row, by one all-gather of seven floats a row and chunk
(js: two). The gradient of the logits is local and carries no factor of tp. Columns of the padded vocabulary take no part,
and a row whose weight is zero has gradient exactly zero whatever its logits are.

The row functions are in rows.py, plain torch, and kernels.py, Triton for CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minitron_mp.losses import kernels as kernels
from minitron_mp.losses import reference as rows_in_torch

ELEMENTS = {"cpu": (1 << 20, 1 << 26, 1 << 26), "cuda": (1 << 26, 1 << 26, 1 << 28)}
"""Logits, in elements, that the row functions take at a time, that one product makes, and whose gradients are multiplied together.

CPU: rows in the cache, products as large as they like. GPU: few float32 logits alive, but products of the gradients over four
chunks, since over few rows the weight gradient is bound by its memory traffic.
"""

LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class TeacherHidden:
    """hidden [s', b, h_t] after the final norm, weight [v_t/tp, h_t] of the same columns as the student's (padding may differ)."""

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class TeacherLogits:
    """logits [s/cp, b, v_t/tp], of the same columns as the student's (padding may differ)."""

    logits: Tensor


@dataclass(frozen=True)
class TeacherTopK:
    """The k most likely tokens at the temperature of the loss, equal on all tensor parallel ranks.

    indices int64 [s', b, k] in the whole vocabulary; log_probs float32 [s', b, k]; log_ghost float32 [s', b, 1]: log of the mass
    of all other tokens, -inf when there are none.
    """

    indices: Tensor
    log_probs: Tensor
    log_ghost: Tensor


TeacherTarget = TeacherHidden | TeacherLogits | TeacherTopK


@dataclass(frozen=True)
class Objective:
    """What is optimised; config.Distill says it to users."""

    divergence: str = "forward_kl"
    temperature: float = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    logits_dtype: torch.dtype = torch.float32
    """Of the logits between the matrix product and the row sums. bf16 inputs with bf16 logits have 10 times the error of float32 logits
    in the gradient at 131072 columns, and are a little faster."""


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    teacher: TeacherTarget | None,
    objective: Objective,
    *,
    vocab_size: int,
    group: Any,
) -> tuple[Tensor, Tensor]:
    """(loss, per token): the sum over tokens above, float32 scalar; [3, s/cp, b] float32 (loss without token weight, divergence, CE), zero for
    tokens of weight zero.

    hidden [s', b, h]: after the student's final norm; s' is s/cp, or s/cp/tp under sequence parallelism (then it is gathered here).
    weight [v/tp, h]: rows [rank v/tp, (rank + 1) v/tp) of the output layer. labels int64 [s/cp, b] below vocab_size.
    token_weights float32 [s/cp, b]: mask, normalisation, loss scale. teacher None: cross-entropy alone.
    group: tensor parallel; all its ranks call and get equal losses. The divergence is given without T^2, for the log; of a
    top-k teacher it is a lower bound.

    Differentiable in hidden and weight. When weight has a main_grad, dW is added to it during the forward pass, autograd sees no
    weight (its hooks do not run), and the gradient that comes in must be 1: put scales into token_weights.
    """
    if teacher is None and objective.kl_weight:
        raise ValueError("kl_weight without a teacher")
    if isinstance(teacher, TeacherTopK) and objective.divergence != "forward_kl":
        raise ValueError(f"a top-k teacher has no {objective.divergence}; use forward_kl")
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    main_grad = getattr(weight, "main_grad", None) if wants_gradient and weight.requires_grad else None
    weight = weight.detach() if main_grad is not None and hidden.requires_grad else weight
    return _Fused.apply(
        hidden,
        weight,
        labels,
        token_weights,
        teacher,
        objective,
        vocab_size,
        group,
        wants_gradient,
        main_grad,
    )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor,
        teacher: TeacherTarget | None,
        objective: Objective,
        vocab_size: int,
        group: Any,
        wants_gradient: bool,
        main_grad: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        tokens = labels.shape[0]
        x = _rows(hidden, tokens, group)
        w, labels_, weights = weight.detach(), labels.reshape(-1), token_weights.reshape(-1).float()
        source = _teacher_rows(teacher, tokens, group)
        w_logits = _for_product(x, w, objective.logits_dtype)
        if isinstance(source, TeacherHidden):  # its precision is its own
            source = TeacherHidden(
                source.hidden, _for_product(source.hidden, source.weight, objective.logits_dtype)
            )
        counts = weights != 0
        columns = w.shape[0]
        first = group.rank() * columns
        valid = max(0, min(columns, vocab_size - first))  # a rank may hold padding only
        local = labels_ - first
        ops = _row_functions(x)

        out = torch.empty((3, len(x)), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if wants_gradient else None
        wants_dw = wants_gradient and weight.requires_grad  # not when there is a main_grad
        dw = torch.zeros(w.shape, dtype=torch.float32, device=w.device) if wants_dw else main_grad

        chunk, part, block = (max(1, size // columns) for size in ELEMENTS[x.device.type])
        for start in range(0, len(x), block):
            stop = min(start + block, len(x))
            in_place = (
                part >= block and x.dtype == objective.logits_dtype
            )  # the gradient takes the place of the logits
            dz = (
                torch.empty((stop - start, columns), dtype=x.dtype, device=x.device)
                if wants_gradient and not in_place
                else None
            )
            for first_row, last_row in _spans(start, stop, part):
                z_s = _product(x[first_row:last_row], w_logits, objective.logits_dtype)
                z_t = _teacher_part(source, first_row, last_row, objective.logits_dtype)
                dz = z_s if wants_gradient and in_place else dz
                for i, end in _spans(first_row, last_row, chunk):
                    here = slice(i - first_row, end - first_row)
                    gradient = None if dz is None else dz[i - start : end - start]
                    out[:, i:end] = _chunk(
                        ops,
                        z_s[here],
                        _take(z_t, here),
                        local[i:end],
                        weights[i:end],
                        first,
                        valid,
                        gradient,
                        objective,
                        group,
                    )
                del z_s, z_t
            if dz is not None and dx is not None:
                torch.mm(dz, w, out=dx[start:stop])
                if dw is not None:
                    _add_product(
                        dw, dz, torch.where(counts[start:stop, None], x[start:stop], 0.0)
                    )  # 0 x not-a-number is not 0
            dz = gradient = None  # or the next block's would lie beside it

        ctx.dx = ctx.dw = None
        if dx is not None:
            ctx.dx = _reduce(dx.view(tokens, *hidden.shape[1:]), hidden.shape[0], group)
            ctx.dw, ctx.in_main_grad, ctx.dtype = (
                (dw if main_grad is None else None),
                main_grad is not None,
                weight.dtype,
            )
        out = torch.where(counts, out, 0.0)  # rows without weight may hold anything, not-a-number included
        per_token = out.view(3, *labels.shape)
        ctx.mark_non_differentiable(per_token)
        return (out[0] * weights).sum(), per_token

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        dx, dw, ctx.dx, ctx.dw = ctx.dx, ctx.dw, None, None
        if ctx.in_main_grad:
            torch._assert_async(
                grad == 1,
                "the gradient of distillation_loss must be 1 when the weight has a main_grad: put scales into token_weights",
            )
        return dx.mul_(grad.to(dx.dtype)), None if dw is None else (dw.mul_(grad)).to(ctx.dtype), *[None] * 8


def _chunk(
    ops: Any,
    z_s: Tensor,
    z_t: Tensor | TeacherTopK | None,
    labels: Tensor,
    weights: Tensor,
    first: int,
    valid: int,
    gradient: Tensor | None,
    objective: Objective,
    group: Any,
) -> Tensor:
    """[3, n] (loss, divergence, ce) of n rows; writes w dloss/dz_s into `gradient` [n, v/tp]. labels: in this rank's numbering."""
    t, name = objective.temperature, objective.divergence
    top = _Top.of(z_t, z_s.shape[1], first, valid) if isinstance(z_t, TeacherTopK) else None
    dense = None if top else z_t
    stats, kept = ops.statistics(z_s, dense, labels, valid, t, name)
    if top:
        stats[:, 4:] = top.statistics(z_s, valid, t)
    parts = _gather(stats, group)  # [tp, n, 7]
    m_s, m_t = parts[..., 0].amax(0), parts[..., 4].amax(0)
    scale_s, scale_t = torch.exp(parts[..., 0] - m_s), torch.exp(parts[..., 4] - m_t)
    d_s, d_1 = (parts[..., 1] * scale_s).sum(0), (parts[..., 2] * scale_s**t).sum(0)
    d_t = (parts[..., 5] * scale_t).sum(0)
    lse_s, lse_1 = m_s + d_s.log(), m_s * t + d_1.log()
    ce = lse_1 - parts[..., 3].sum(0)

    kl = lse_t = extra = torch.zeros_like(ce)
    if top:
        lse_t, extra = m_t + d_t.log(), top.log_ghost.exp()  # of the student too: all tokens but the k
        kl = top.divergence(lse_t, lse_s, parts[..., 6].sum(0))
    elif dense is not None:
        lse_t = m_t + d_t.log()
        gap = (m_t - m_s) + (
            d_t.log() - d_s.log()
        )  # lse_t - lse_s would keep the rounding of two large numbers
        if name == "forward_kl":
            kl = (parts[..., 6] * scale_t).sum(0) / d_t - gap
        elif name == "reverse_kl":
            kl = extra = (parts[..., 6] * scale_s).sum(0) / d_s + gap
        else:
            sums = _gather(ops.js_sums(z_s, dense, lse_s, lse_t, valid, t), group).sum(
                0
            )  # [n, 2]: KL(p || m), KL(q || m)
            kl, extra = sums.mean(1), sums[:, 1]
    if gradient is not None:
        row_values = torch.stack(
            [lse_s, lse_t, lse_1, weights * (objective.kl_weight * t), weights * objective.ce_weight, extra],
            1,
        )
        (top or ops).gradient(
            z_s, dense, stats, kept, row_values, labels, valid, t, name, objective.ce_weight > 0, gradient
        )
    return torch.stack([objective.kl_weight * t**2 * kl + objective.ce_weight * ce, kl, ce])


@dataclass(frozen=True)
class _Top:
    """The teacher's k tokens of n rows. Works in plain torch on any device: k entries a row are no work for a kernel."""

    place: Tensor
    """int64 [n, k], in this rank's numbering; of another rank's tokens one column behind the last."""
    log_p: Tensor
    log_ghost: Tensor

    @classmethod
    def of(cls, teacher: TeacherTopK, columns: int, first: int, valid: int) -> _Top:
        place = teacher.indices - first
        return cls(
            torch.where((place >= 0) & (place < valid), place, columns),
            teacher.log_probs,
            teacher.log_ghost[:, 0],
        )

    def statistics(self, z_s: Tensor, valid: int, t: float) -> Tensor:
        """[n, 3] of this rank: max s of all tokens but the k, sum e^(s - that) of them (one minus the k would cancel), sum of p s of the k."""
        s, behind = z_s[:, :valid].float() / t, (0, z_s.shape[1] + 1 - valid)
        others = F.pad(s, behind, value=-torch.inf).scatter_(1, self.place, -torch.inf)
        peak = others.amax(1).clamp_min(LOWEST)  # finite when there are no others
        return torch.stack(
            [
                peak,
                torch.exp(others - peak[:, None]).sum(1),
                (self.log_p.exp() * F.pad(s, behind).gather(1, self.place)).sum(1),
            ],
            1,
        )

    def divergence(self, lse_others: Tensor, lse_s: Tensor, cross: Tensor) -> Tensor:
        p, has_ghost = self.log_p.exp(), (self.log_ghost > -torch.inf) & (lse_others > -torch.inf)
        ghost = torch.where(has_ghost, self.log_ghost.exp() * (self.log_ghost - lse_others + lse_s), 0.0)
        entropy = torch.where(p > 0, p * self.log_p, 0.0).sum(1)
        return entropy - cross + p.sum(1) * lse_s + ghost

    def gradient(
        self,
        z_s: Tensor,
        _: Any,
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
        """As rows.gradient. rows[:, 1]: log of sum e^s of all tokens but the k; rows[:, 5]: the teacher's mass of them."""
        if valid == 0:
            out.zero_()
            return
        raw, behind = z_s[:, :valid].float(), (0, z_s.shape[1] + 1 - valid)
        q, among_others = (
            F.pad(torch.exp(raw / t - rows[:, :1]), behind),
            F.pad(torch.exp(raw / t - rows[:, 1:2]), behind),
        )
        on_top = q.gather(1, self.place) - self.log_p.exp()
        total = (q - among_others * rows[:, 5:]).scatter_(1, self.place, on_top)[:, :valid] * rows[:, 3:4]
        if has_ce:
            total += torch.exp(raw - rows[:, 2:3]) * rows[:, 4:5]
        rows_in_torch.write(total, rows, labels, valid, has_ce, out)


def _row_functions(x: Tensor) -> Any:
    """The module that has statistics, js_sums and gradient for this device."""
    if not x.is_cuda:
        return rows_in_torch
    from minitron_mp.losses import kernels

    return kernels


def _rows(x: Tensor, tokens: int, group: Any) -> Tensor:
    """[s', b, n] -> [s b, n] contiguous; gathered over the group when s' is a part of the sequence."""
    x = x.detach()
    if x.shape[0] != tokens:
        whole = x.new_empty((tokens, *x.shape[1:]))
        dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
        x = whole
    return x.reshape(-1, x.shape[-1])


def _teacher_rows(teacher: TeacherTarget | None, tokens: int, group: Any) -> TeacherTarget | None:
    if isinstance(teacher, TeacherHidden):
        return TeacherHidden(_rows(teacher.hidden, tokens, group), teacher.weight.detach())
    if isinstance(teacher, TeacherLogits):
        return TeacherLogits(_rows(teacher.logits, tokens, group))
    if isinstance(teacher, TeacherTopK):
        return TeacherTopK(
            *(_rows(x, tokens, group) for x in (teacher.indices, teacher.log_probs, teacher.log_ghost))
        )
    return None


def _teacher_part(
    teacher: TeacherTarget | None, first: int, last: int, dtype: torch.dtype
) -> Tensor | TeacherTopK | None:
    """The teacher's logits, or top k, of some rows."""
    if isinstance(teacher, TeacherHidden):
        return _product(teacher.hidden[first:last], teacher.weight, dtype)
    return _take(teacher.logits if isinstance(teacher, TeacherLogits) else teacher, slice(first, last))


def _take(x: Tensor | TeacherTopK | None, rows: slice) -> Any:
    if isinstance(x, TeacherTopK):
        return TeacherTopK(x.indices[rows], x.log_probs[rows], x.log_ghost[rows])
    return None if x is None else x[rows]


def _spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for i in range(start, stop, size):
        yield i, min(i + size, stop)


def _for_product(x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """w as _product(x, w, dtype) takes it: converted where no kernel multiplies these dtypes into that one. Once for all rows."""
    widens = (
        x.is_cuda and x.dtype == w.dtype and dtype is torch.float32
    )  # a GPU multiplies bf16 into float32, a CPU does not
    return w if widens else w.to(dtype)


def _product(x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """x w^T in dtype, accumulated in float32; w from _for_product."""
    if w.dtype == dtype:
        return torch.mm(x.to(dtype), w.t())
    return torch.mm(x, w.t(), out_dtype=dtype)


def float32_logits(hidden: Tensor, weight: Tensor, tokens: int, group: Any) -> Iterator[Tensor]:
    """hidden [s', b, h], s' = tokens or, split over the group, a part of it -> the rows' logits [n, v/tp], in float32 from bf16 operands.

    In chunks of the size that the loss has; the rows of all are tokens x b, in order. No gradient.
    """
    rows, chunk = _rows(hidden, tokens, group), max(1, ELEMENTS[hidden.device.type][1] // weight.shape[0])
    weight = _for_product(rows, weight.detach(), torch.float32)
    for start, stop in _spans(0, len(rows), chunk):
        yield _product(rows[start:stop], weight, torch.float32)


def _add_product(dw: Tensor, dz: Tensor, x: Tensor) -> None:
    """dw += dz^T x."""
    if dw.dtype == dz.dtype:
        dw.addmm_(dz.t(), x)
    elif dz.is_cuda:
        torch.addmm(dw, dz.t(), x, out_dtype=dw.dtype, out=dw)
    else:
        dw += torch.mm(dz.t(), x)


def _reduce(dx: Tensor, length: int, group: Any) -> Tensor:
    """Sum [s, b, h] over the group; the rank's part [s/tp, b, h] when the sequence is split."""
    if length != dx.shape[0]:
        part = dx.new_empty((length, *dx.shape[1:]))
        dist.reduce_scatter_tensor(part, dx, group=group)
        return part
    if group.size() > 1:
        dist.all_reduce(dx, group=group)
    return dx


def _gather(x: Tensor, group: Any) -> Tensor:
    """[n, k] -> [tp, n, k]."""
    if group.size() == 1:
        return x[None]
    whole = x.new_empty((group.size(), *x.shape))
    dist.all_gather_into_tensor(whole.view(-1, x.shape[1]), x.contiguous(), group=group)
    return whole
