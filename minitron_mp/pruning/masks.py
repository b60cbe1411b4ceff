"""Masks with which a teacher computes what its student would compute, without copies of weights.

Every reader of the residual stream is a norm, so its channels are masked at the input of each norm.
Values that are written into cut channels are never read. A norm divides by the full width, so its
weight and epsilon are scaled to the student's width (vectors of h, restored afterwards):

    RMSNorm      x m -> weight sqrt(k/h), epsilon k/h               m mask of k kept of h channels
    LayerNorm1p  x m + (1 - m) mean of the kept -> the same scaling, and bias m

Units at the input of a linear layer are masked there. A dropped layer is removed from the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from minitron_mp.errors import InputError
from minitron_mp.models.axes import AXES, NO_LAYER, Axis, LinearInput
from minitron_mp.models.sharded_model import ShardedModel, unwrap
from minitron_mp.pruning.plan import PrunePlan


@contextmanager
def masked(model: ShardedModel, plan: PrunePlan) -> Iterator[None]:
    """Context manager in which the teacher computes what a student sliced by the plan computes.

    The two agree to rounding. On exit the model is restored. For forward passes without gradients.
    Each rank masks its part of the model, without communication.
    """
    if plan.merge:
        raise InputError(
            "this plan merges heads; masks only work for plans without merged heads, "
            "so remove target.merge_heads"
        )
    with ExitStack() as stack:
        for chunk in map(unwrap, model.chunks):
            for axis in AXES.values():
                for block in chunk.decoder.layers:
                    if block.layer_number - 1 in plan.layers:
                        _mask_block(block, axis, plan, model, stack)
                if chunk.post_process and _is_cut(axis, NO_LAYER, plan):
                    for norm in axis.outer_norms:
                        _mask_norm(chunk.decoder.get_submodule(norm), axis, NO_LAYER, plan, stack)
            _leave_out_layers(chunk.decoder, plan, stack)
        yield


def _is_cut(axis: Axis, layer: int, plan: PrunePlan) -> bool:
    if axis.per_layer == (layer == NO_LAYER):
        return False
    return len(plan.units(axis, layer)) < axis.num_units(plan.teacher, layer)


def _mask_block(block: Any, axis: Axis, plan: PrunePlan, model: ShardedModel, stack: ExitStack) -> None:
    layer = block.layer_number - 1 if axis.per_layer else NO_LAYER
    if not _is_cut(axis, layer, plan):
        return
    for probe in axis.probes:
        if isinstance(probe, LinearInput):
            _mask_linear(block.get_submodule(probe.module), axis, layer, plan, model, stack)
        else:
            _mask_norm(block.get_submodule(probe.norm), axis, layer, plan, stack)


def _mask_linear(
    linear: Any, axis: Axis, layer: int, plan: PrunePlan, model: ShardedModel, stack: ExitStack
) -> None:
    """Set the cut units at the input of a linear layer to zero."""
    mask = _flags(plan.units(axis, layer), axis.num_units(plan.teacher, layer), linear)
    if axis.split_over_tp:
        tp = model.world.groups.tp
        mask = mask.chunk(tp.size())[tp.rank()]
    mask = mask.repeat_interleave(axis.width(plan.teacher))
    _hook(linear, stack, lambda _, args: (args[0] * mask, *args[1:]))


def _mask_norm(norm: Any, axis: Axis, layer: int, plan: PrunePlan, stack: ExitStack) -> None:
    if isinstance(norm, IdentityOp):
        raise InputError(
            "this model has norms inside its linear layers (Megatron's Transformer Engine spec); "
            "masks need separate norms: load the model with build_model()"
        )
    units, size = plan.units(axis, layer), axis.num_units(plan.teacher, layer)
    mask, share = _flags(units, size, norm), len(units) / size

    def fill_with_mean(_: object, args: tuple[Tensor]) -> tuple[Tensor]:
        mean = (args[0] * mask).sum(-1, keepdim=True, dtype=torch.float32) / len(units)
        return (torch.where(mask.bool(), args[0], mean.to(args[0].dtype)),)

    if getattr(norm, "bias", None) is None:
        _hook(norm, stack, lambda _, args: (args[0] * mask,))
        _replace(norm.weight, norm.weight * math.sqrt(share), stack)
    else:
        _hook(norm, stack, fill_with_mean)
        _replace(norm.weight, (norm.weight + 1) * math.sqrt(share) - 1, stack)
        _replace(norm.bias, norm.bias * mask, stack)
    stack.callback(setattr, norm, "eps", norm.eps)
    norm.eps *= share


def _leave_out_layers(decoder: Any, plan: PrunePlan, stack: ExitStack) -> None:
    kept = [block for block in decoder.layers if block.layer_number - 1 in plan.layers]
    if len(kept) < len(decoder.layers):
        stack.callback(setattr, decoder, "layers", decoder.layers)
        decoder.layers = nn.ModuleList(kept)


def _hook(module: Any, stack: ExitStack, hook: Callable) -> None:
    stack.callback(module.register_forward_pre_hook(hook).remove)


def _replace(parameter: Tensor, value: Tensor, stack: ExitStack) -> None:
    stack.callback(setattr, parameter, "data", parameter.data)
    parameter.data = value.detach()


def _flags(keep: np.ndarray, size: int, like: Any) -> Tensor:
    """Return [size] with 1 for kept units and 0 for cut ones, in a module's dtype, on its device."""
    weight = next(like.parameters())
    flags = torch.zeros(size, dtype=weight.dtype, device=weight.device)
    flags[torch.as_tensor(keep, device=weight.device)] = 1
    return flags
