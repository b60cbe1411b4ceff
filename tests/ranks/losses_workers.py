"""Worker functions for the loss tests: each rank slices its part out of full tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mp.losses import fused as fused_module
from minitron_mp.losses import torch_rows
from minitron_mp.losses.fused import distillation_loss
from minitron_mp.losses.objective import Objective, TeacherHidden, TeacherLogits, TeacherTarget
from minitron_mp.losses.tile_sizes import TILE_SIZES, TileSizes


def fused_all(calls: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """fused() for each; a round trip to the ranks costs more than a loss of this size."""
    return {name: fused(**call) for name, call in calls.items()}


def fused(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    teacher: TeacherTarget | None,
    objective: Objective,
    vocab_size: int,
    *,
    teacher_padding: int = 0,
    sequence_parallel: bool = False,
    chunks: tuple[int, int, int] | None = None,
    main_grad: bool = False,
    incoming: float = 1.0,
    defect: str | None = None,
) -> dict[str, Any]:
    """Return distillation_loss and its gradients on this rank.

    hidden [s, b, h], weight [v, h] and the teacher's tensors are full tensors.
    teacher_padding: number of NaN columns behind the teacher's valid ones, on each rank.
    chunks: sizes in rows, see tile_sizes.TILE_SIZES.
    main_grad: whether the weight has a main_grad, filled with 1.
    incoming: gradient of the loss.
    defect: see broken().
    """
    group = dist.group.WORLD
    own = weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    if main_grad:
        own.main_grad = torch.ones(own.shape)
    first = group.rank() * len(own)
    columns = slice(first, first + max(0, min(len(own), vocab_size - first)))
    x = (hidden.chunk(group.size())[group.rank()] if sequence_parallel else hidden).clone().requires_grad_()
    target = _own_teacher(teacher, columns, teacher_padding, group if sequence_parallel else None)
    with broken(defect, group.size()), chunked(chunks, len(own)):
        loss, per_token = distillation_loss(
            x, own, labels, token_weights, target, objective, vocab_size=vocab_size, group=group
        )
        with torch.no_grad():
            value_alone, _ = distillation_loss(
                x, own, labels, token_weights, target, objective, vocab_size=vocab_size, group=group
            )
        refused = ""
        try:
            (loss * incoming).backward()
        except RuntimeError as error:
            refused = str(error)
    return {
        "loss": loss.detach(),
        "per_token": per_token,
        "without_gradient": value_alone,
        "dx": x.grad,
        "dw": own.grad,
        "main_grad": getattr(own, "main_grad", None),
        "refused": refused,
    }


def _own_teacher(
    teacher: TeacherTarget | None, columns: slice, padding: int, split: Any
) -> TeacherTarget | None:
    """Return this rank's columns and, with a group, its part of the sequence."""

    def part(x: Tensor) -> Tensor:
        return x if split is None else x.chunk(split.size())[split.rank()]

    if isinstance(teacher, TeacherHidden):
        own = teacher.weight[columns]
        return TeacherHidden(
            part(teacher.hidden), torch.cat([own, own.new_full((padding, own.shape[1]), torch.nan)])
        )
    if isinstance(teacher, TeacherLogits):
        own = teacher.logits[..., columns]
        return TeacherLogits(torch.cat([own, own.new_full((*own.shape[:-1], padding), torch.nan)], -1))
    return None if teacher is None else type(teacher)(*map(part, vars(teacher).values()))


@contextmanager
def chunked(sizes: tuple[int, int, int] | None, columns: int) -> Iterator[None]:
    usual = TILE_SIZES["cpu"]
    TILE_SIZES["cpu"] = TileSizes(*(size * columns for size in sizes)) if sizes else usual
    try:
        yield
    finally:
        TILE_SIZES["cpu"] = usual


@contextmanager
def broken(defect: str | None, size: int) -> Iterator[None]:
    """Make gradients tp times too large, as if autograd summed a full gradient over the ranks.

    logits: the gradient of the logits, so both results change.
    hidden: only the gradient of the hidden states.
    """
    finish, reduce = torch_rows.finish, fused_module.reduce_hidden_gradient

    def too_large(*arguments: Any) -> None:
        finish(*arguments)
        if arguments[-1] is not None:
            arguments[-1].mul_(size)

    try:
        if defect == "logits":
            torch_rows.finish = too_large
        if defect == "hidden":
            fused_module.reduce_hidden_gradient = _times(reduce, size)
        yield
    finally:
        torch_rows.finish, fused_module.reduce_hidden_gradient = finish, reduce


def _times(function: Callable[..., Tensor], factor: int) -> Callable[..., Tensor]:
    return lambda *arguments: function(*arguments) * factor


def top_k(hidden: Tensor, weight: Tensor, k: int, vocab_size: int, temperature: float) -> tuple[Tensor, ...]:
    """Return the teacher's top k as the student receives it.

    The inputs are the full hidden [s, b, h] and weight [v, h].
    """
    from minitron_mp.losses.top_k import pack_top_k, top_k_of, unpack_top_k

    group = dist.group.WORLD
    z = hidden @ weight.chunk(group.size())[group.rank()].T
    top = unpack_top_k(pack_top_k(top_k_of(z, k, vocab_size, group, temperature)))
    return top.indices, top.log_probs, top.log_ghost
