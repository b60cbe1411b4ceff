"""The distillation loss, from hidden states to gradients, in tiles of tokens.

It is exact, vocabulary-parallel, and fused with the output layers of student and teacher.

    L = sum_i w_i (kl_weight T^2 D(teacher, student)_i + ce_weight CE(labels)_i)

w_i are the token weights. D is a divergence of divergences.py at temperature T, or the divergence
of top_k.py.

The student's logits exist for one tile of tokens at a time. The gradient is computed together with
the loss, because recomputing the logits in the backward pass would add half of the cost. So
forward() stores dX, and adds dW to weight.main_grad if Megatron's data-parallel wrapper has created
main_grad.

Each rank holds v/tp columns. It needs a few sums per row from the other ranks: one all-gather of
RowStatistics per tile, and a second all-gather for a divergence with second_sums. The gradient of
the logits is local and has no factor of tp. Columns of the padded vocabulary are ignored. A row
with weight zero has gradient exactly zero for any logits, including NaN.

The row functions are in torch_rows.py (plain torch) and kernel_calls.py (Triton, for CUDA).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mp.losses import torch_rows
from minitron_mp.losses.divergences import DIVERGENCES
from minitron_mp.losses.objective import (
    Objective,
    TeacherHidden,
    TeacherLogits,
    TeacherTarget,
    TeacherTopK,
)
from minitron_mp.losses.rows import LogitRows, RankStatistics, TopK
from minitron_mp.losses.tensor_parallel import (
    add_weight_gradient,
    for_product,
    gather_rows,
    gather_table,
    product,
    reduce_hidden_gradient,
)
from minitron_mp.losses.tile_sizes import TILE_SIZES


class RowFunctions(Protocol):
    """The functions that torch_rows.py and kernel_calls.py both provide."""

    def statistics(self, rows: LogitRows) -> RankStatistics: ...

    def second_sums(self, rows: LogitRows, tables: Tensor) -> Tensor: ...

    def finish(
        self,
        rows: LogitRows,
        own: RankStatistics,
        tables: Tensor,
        second_sums: Tensor | None,
        losses: Tensor,
        gradient: Tensor | None,
    ) -> None: ...


@dataclass(frozen=True)
class _Call:
    """Arguments of distillation_loss() without gradients. main_grad: weight.main_grad or None."""

    labels: Tensor
    token_weights: Tensor
    target: TeacherTarget | None
    objective: Objective
    vocab_size: int
    group: dist.ProcessGroup
    needs_gradient: bool
    main_grad: Tensor | None


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    target: TeacherTarget | None,
    objective: Objective,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Return the loss, a float32 scalar, and the statistics of each token, float32 [3, s/cp, b].

    The statistics are (loss without token weight, divergence, CE). They are zero for tokens with
    weight zero. The loss is differentiable in hidden and weight.

    hidden [s', b, h]: output of the student's final norm. s' is s/cp, or s/cp/tp under sequence
        parallelism. In the second case this function gathers it.
    weight [v/tp, h]: rows [rank v/tp, (rank + 1) v/tp) of the output layer.
    labels int64 [s/cp, b]: below vocab_size.
    token_weights float32 [s/cp, b]: mask, normalisation and loss scale.
    target: the teacher's target. None: cross-entropy alone.
    group: tensor-parallel group. All its ranks must call the function. They get equal losses.

    The divergence is returned without T^2, for the log. With a top-k target it is a lower bound.

    When weight has a main_grad, dW is added to it during the forward pass. Then autograd does not
    run the hooks of weight, and the incoming gradient must be 1: put scales into token_weights.
    """
    if target is None and objective.kl_weight:
        raise ValueError(
            f"kl_weight is {objective.kl_weight}, but target is None; give a target, or set kl_weight to 0"
        )
    if isinstance(target, TeacherTopK) and objective.divergence != "forward_kl":
        raise ValueError(
            f"divergence {objective.divergence} is not defined for a top-k target; use forward_kl"
        )
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    main_grad = getattr(weight, "main_grad", None) if needs_gradient and weight.requires_grad else None
    weight = weight.detach() if main_grad is not None and hidden.requires_grad else weight
    call = _Call(labels, token_weights, target, objective, vocab_size, group, needs_gradient, main_grad)
    return _Fused.apply(hidden, weight, call)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        loss = _TiledLoss(hidden, weight, call)
        loss.run()
        ctx.dx = ctx.dw = None
        ctx.in_main_grad = call.main_grad is not None
        ctx.dtype = weight.dtype
        if loss.dx is not None:
            dx = loss.dx.view(call.labels.shape[0], *hidden.shape[1:])
            ctx.dx = reduce_hidden_gradient(dx, hidden.shape[0], call.group)
            ctx.dw = loss.dw if call.main_grad is None else None
        # Rows without weight may contain NaN.
        statistics = torch.where(loss.has_weight, loss.out, 0.0)
        per_token = statistics.view(3, *call.labels.shape)
        ctx.mark_non_differentiable(per_token)
        return (statistics[0] * loss.token_weights).sum(), per_token

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: object) -> tuple[Tensor | None, ...]:
        dx, dw, ctx.dx, ctx.dw = ctx.dx, ctx.dw, None, None
        if ctx.in_main_grad:
            torch._assert_async(
                grad == 1,
                "the gradient of distillation_loss must be 1 when the weight has a main_grad: "
                "put scales into token_weights",
            )
        return dx.mul_(grad.to(dx.dtype)), None if dw is None else dw.mul_(grad).to(ctx.dtype), None


class _TiledLoss:
    """One call of the loss on this rank, with n = s b rows. s is the sequence after the gather.

    out float32 [3, n]: loss without token weight, divergence, CE. dx [n, h], dw [v/tp, h]:
        gradients, or None.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, call: _Call):
        num_tokens = call.labels.shape[0]
        columns = weight.shape[0]
        self.objective, self.group = call.objective, call.group
        self.needs_gradient = call.needs_gradient
        self.x = gather_rows(hidden, num_tokens, call.group)
        self.weight = weight.detach()
        self.logits_weight = for_product(self.x, self.weight, self.objective.logits_dtype)
        first_column = call.group.rank() * columns
        self.target = _target_rows(
            call.target, num_tokens, call.group, self.objective.logits_dtype, first_column
        )
        self.valid = max(0, min(columns, call.vocab_size - first_column))  # 0: only padding
        self.labels = call.labels.reshape(-1) - first_column
        self.token_weights = call.token_weights.reshape(-1).float()
        self.has_weight = self.token_weights != 0
        self.row_functions = _row_functions(self.x)
        device = self.x.device
        self.tile_rows = TILE_SIZES[device.type].rows(len(self.x), columns)
        self.out = torch.empty((3, len(self.x)), dtype=torch.float32, device=device)
        self.dx = torch.empty_like(self.x) if call.needs_gradient else None
        self.dw = call.main_grad
        if call.needs_gradient and weight.requires_grad:  # never with a main_grad
            self.dw = torch.zeros(weight.shape, dtype=torch.float32, device=device)

    def run(self) -> None:
        """Compute out, dx and dw block by block."""
        for start, stop in _spans(0, len(self.x), self.tile_rows.weight_gradient_gemm):
            # This is a separate function, so that the logits of a block are freed before the next.
            self._block(start, stop)

    def _block(self, start: int, stop: int) -> None:
        """Compute rows [start, stop): logits part by part, then one gradient product per block."""
        columns, dtype = self.weight.shape[0], self.objective.logits_dtype
        part = self.tile_rows.logits_gemm
        # in_place: the gradient overwrites the logits.
        in_place = part >= stop - start and self.x.dtype == dtype
        dz: Tensor | None = None
        if self.needs_gradient and not in_place:
            dz = torch.empty((stop - start, columns), dtype=self.x.dtype, device=self.x.device)
        for first, last in _spans(start, stop, part):
            student = product(self.x[first:last], self.logits_weight, dtype)
            teacher = _target_part(self.target, first, last, dtype)
            if self.needs_gradient and in_place:
                dz = student
            for i, end in _spans(first, last, self.tile_rows.softmax):
                tile_rows = slice(i - first, end - first)
                gradient = None if dz is None else dz[i - start : end - start]
                self._tile(i, end, student[tile_rows], _take(teacher, tile_rows), gradient)
            del student, teacher  # free them before the next part is allocated
        if dz is None or self.dx is None:
            return
        torch.mm(dz, self.weight, out=self.dx[start:stop])
        if self.dw is not None:
            # Rows without weight have dz = 0, but 0 x NaN is not 0.
            x = torch.where(self.has_weight[start:stop, None], self.x[start:stop], 0.0)
            add_weight_gradient(self.dw, dz, x)

    def _tile(
        self,
        start: int,
        stop: int,
        student: Tensor,
        teacher: Tensor | TopK | None,
        gradient: Tensor | None,
    ) -> None:
        """Write `out` and the gradient of the logits, if it is needed, of rows [start, stop).

        student: logits [n, v/tp]. teacher: logits or top k of the rows. gradient: [n, v/tp].
        """
        rows = LogitRows(
            student,
            teacher if isinstance(teacher, Tensor) else None,
            self.labels[start:stop],
            self.token_weights[start:stop],
            self.valid,
            self.objective,
            teacher if isinstance(teacher, TopK) else None,
        )
        own = self.row_functions.statistics(rows)
        tables = gather_table(own.table, self.group)
        second_sums = None
        if rows.teacher is not None and DIVERGENCES[rows.divergence].second_sums is not None:
            second_sums = gather_table(self.row_functions.second_sums(rows, tables), self.group)
        self.row_functions.finish(rows, own, tables, second_sums, self.out[:, start:stop], gradient)


def float32_logits(
    hidden: Tensor, weight: Tensor, num_tokens: int, group: dist.ProcessGroup
) -> Iterator[Tensor]:
    """Yield float32 logits [n, v/tp] of consecutive rows, without gradients.

    hidden [s', b, h]: s' is num_tokens, or a part of it that is gathered over the group. The
    function yields num_tokens x b rows in total, in tiles of TileRows.logits_gemm rows.
    """
    x = gather_rows(hidden, num_tokens, group)
    tile = TILE_SIZES[hidden.device.type].rows(len(x), weight.shape[0]).logits_gemm
    weight = for_product(x, weight.detach(), torch.float32)
    for start, stop in _spans(0, len(x), tile):
        yield product(x[start:stop], weight, torch.float32)


def _row_functions(x: Tensor) -> RowFunctions:
    """Return the module with the row functions for this device."""
    if not x.is_cuda:
        return torch_rows
    from minitron_mp.losses import kernel_calls

    return kernel_calls


RowTarget = TeacherHidden | TeacherLogits | TopK | None
"""A target whose tensors have rows [n, ...] instead of [s', b, ...]."""


def _target_rows(
    target: TeacherTarget | None,
    num_tokens: int,
    group: dist.ProcessGroup,
    dtype: torch.dtype,
    first_column: int,
) -> RowTarget:
    """Return the target by rows. Its weight fits product(), its columns are those of this rank."""
    if isinstance(target, TeacherHidden):
        hidden = gather_rows(target.hidden, num_tokens, group)
        return TeacherHidden(hidden, for_product(hidden, target.weight.detach(), dtype))
    if isinstance(target, TeacherLogits):
        return TeacherLogits(gather_rows(target.logits, num_tokens, group))
    if isinstance(target, TeacherTopK):
        return TopK(
            gather_rows(target.indices, num_tokens, group) - first_column,
            gather_rows(target.log_probs, num_tokens, group),
            gather_rows(target.log_ghost, num_tokens, group)[:, 0],
        )
    return None


def _target_part(target: RowTarget, first: int, last: int, dtype: torch.dtype) -> Tensor | TopK | None:
    """Return the teacher's logits, or its top k, of rows [first, last)."""
    if isinstance(target, TeacherHidden):
        return product(target.hidden[first:last], target.weight, dtype)
    return _take(target.logits if isinstance(target, TeacherLogits) else target, slice(first, last))


def _take(x: Tensor | TopK | None, rows: slice) -> Tensor | TopK | None:
    if isinstance(x, TopK):
        return TopK(x.columns[rows], x.log_probs[rows], x.log_ghost[rows])
    return None if x is None else x[rows]


def _spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for i in range(start, stop, size):
        yield i, min(i + size, stop)
