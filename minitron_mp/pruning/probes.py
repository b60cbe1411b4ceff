"""Forward hooks at the tensors that importance.py scores, and the distance of hidden states.

s sequence  b microbatch  h hidden
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor


def hook_input(linear: Any, record: Callable[[Tensor], None]) -> Any:
    """Call `record` with the input of a linear layer in each forward pass; return the hook's handle."""
    return linear.register_forward_pre_hook(lambda _, args: record(args[0]))


def hook_norm(norm: Any, linear: Any, record: Callable[[Tensor], None]) -> Any:
    """Call `record` with the output of a norm in each forward pass; return the hook's handle.

    linear: the layer that reads the norm. If it contains the norm, `norm` is an IdentityOp.
    """
    if not isinstance(norm, IdentityOp):
        return norm.register_forward_hook(lambda _, args, output: record(output))
    # Transformer Engine's LayerNormLinear does not return the output of its norm (and rounds it in
    # FP8), so the norm is recomputed.
    return linear.register_forward_pre_hook(
        lambda module, args: record(_norm_inside(module, args[0].detach()))
    )


def _norm_inside(linear: Any, x: Tensor) -> Tensor:
    """Return the output [s, b, h] of the norm inside a Transformer Engine LayerNormLinear."""
    weight = linear.layer_norm_weight + 1 if linear.zero_centered_gamma else linear.layer_norm_weight
    if linear.normalization == "RMSNorm":
        return F.rms_norm(x, weight.shape, weight, linear.eps)
    return F.layer_norm(x, weight.shape, weight, linear.layer_norm_bias, linear.eps)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 - cosine of each pair of rows: a, b [n, h] -> [n] float32, computed in float32.

    The float32 precision is needed because in bf16 the result would be rounding noise for a layer
    whose output is close to its input.
    """
    if not a.is_cuda:
        return 1 - torch.cosine_similarity(a.float(), b.float(), dim=-1)
    from minitron_mp.pruning import cosine_kernel

    return cosine_kernel.cosine_distance(a, b)
