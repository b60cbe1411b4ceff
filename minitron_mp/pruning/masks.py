"""A teacher that computes what its student would compute, by masks: candidates are judged without a weight being copied.

Everything that reads the residual stream is a norm, so hidden channels are masked there, at the input; what is written into cut channels is
never read. A norm divides by the full width, so its weight and epsilon make up for the difference (vectors of h, put back afterwards):

    RMSNorm      x m -> weight sqrt(k/h), epsilon k/h                        m mask of k kept of h channels
    LayerNorm1p  x m + (1 - m) mean of the kept -> likewise, bias m

Heads are masked at the input of linear_proj, neurons at that of linear_fc2; a layer that goes is left out of its block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.models.build import unwrap
from minitron_mp.pruning.plan import PrunePlan


@contextmanager
def masked(chunks: list[Any], plan: PrunePlan, world: World) -> Iterator[None]:
    """Inside, the teacher's chunks compute what a student sliced by the plan computes, to rounding; afterwards they are as before.

    For forward passes without gradients. Each rank masks what it holds; no communication.
    """
    if plan.merge:
        raise InputError("masks do not merge heads; leave target.merge_heads out")
    with ExitStack() as stack:
        for chunk in map(unwrap, chunks):
            norms = [chunk.decoder.final_layernorm] if chunk.post_process else []
            for block in chunk.decoder.layers:
                if block.layer_number - 1 in plan.layers:
                    _mask_layer(block, plan, world, stack)
                    norms += [block.input_layernorm, block.pre_mlp_layernorm]
            if len(plan.hidden) < plan.teacher.hidden_size:
                for norm in norms:
                    _mask_norm(norm, plan, stack)
            _leave_out_layers(chunk.decoder, plan, stack)
        yield


def _mask_layer(block: Any, plan: PrunePlan, world: World, stack: ExitStack) -> None:
    teacher, layer, tp = plan.teacher, block.layer_number - 1, world.groups.tp
    sites = (
        (block.mlp.linear_fc2, plan.keep("ffn", layer), teacher.ffn_hidden_size, 1),
        (
            block.self_attention.linear_proj,
            plan.keep("heads", layer),
            teacher.num_attention_heads,
            teacher.kv_channels,
        ),
    )
    for linear, keep, size, width in sites:
        if len(keep) < size:
            mask = _flags(keep, size, linear).chunk(tp.size())[tp.rank()].repeat_interleave(width)
            _hook(linear, stack, lambda _, args, mask=mask: (args[0] * mask, *args[1:]))


def _mask_norm(norm: Any, plan: PrunePlan, stack: ExitStack) -> None:
    if isinstance(norm, IdentityOp):
        raise InputError(
            "this model has its norms inside its linear layers (Megatron's own Transformer Engine spec); search with one of build_model()"
        )
    kept, size = len(plan.hidden), plan.teacher.hidden_size
    mask, share = _flags(plan.hidden, size, norm), kept / size

    def fill_with_mean(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        mean = (args[0] * mask).sum(-1, keepdim=True, dtype=torch.float32) / kept
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


def _flags(keep: Any, size: int, like: Any) -> Tensor:
    """[size] of ones and zeros, in the dtype and on the device of a module."""
    weight = next(like.parameters())
    flags = torch.zeros(size, dtype=weight.dtype, device=weight.device)
    flags[torch.as_tensor(keep, device=weight.device)] = 1
    return flags
