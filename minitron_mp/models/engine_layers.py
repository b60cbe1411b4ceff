"""Transformer Engine's modules. The import of this file needs a GPU build of Transformer Engine.

Norms are separate modules. They run the kernels of Transformer Engine, but not its module RMSNorm:
that is an operation of transformer_engine.pytorch.ops, and builds an OperationFuser and fuses
anew in each forward pass (ops/op.py, BasicOperation.forward, in 2.16). That is host time only, and
it counts where the host is the limit. Here a norm is one autograd function around one kernel.

The other choice would be Megatron's own spec, where a LayerNormLinear holds the norm. It saves one
write and one read of the norm's output. But importance, masks and hidden-state matching read that
output, so a model in training and a scored model would be built from different layers, or
return_layernorm_output would be needed, which turns off the overlap of the all-gather
(module/layernorm_linear.py). With separate norms all models have the same layers, and they differ
from the local layers only in their kernels.

What LayerNormLinear gets from Megatron and a plain Linear does not are the overlaps of the backward
pass under tp_comm_overlap. _BulkOverlap adds them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformer_engine.pytorch as te
import transformer_engine_torch as kernels
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType

from minitron_mp.models.layers import LayerNorm1p, RMSNorm

SM_MARGIN = 0
"""Multiprocessors that the kernel of a norm leaves free."""


class UnfusedNormProvider(TESpecProvider):
    """Transformer Engine's modules, with norms as separate modules instead of fused norms."""

    def fuse_layernorm_and_linear(self) -> bool:
        return False

    def column_parallel_linear(self) -> type:
        return OverlappedColumnParallelLinear


class EngineRMSNorm(RMSNorm):
    """RMSNorm with Transformer Engine's kernels."""

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class EngineLayerNorm1p(LayerNorm1p):
    """LayerNorm1p with Transformer Engine's kernels, which add 1 to the stored weight."""

    def forward(self, x: Tensor) -> Tensor:
        return _LayerNorm1p.apply(x, self.weight, self.bias, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.contiguous().view(-1, x.shape[-1])
        # ..., no output tensor, no quantizer, dtype of the output, ..., weight - 1 is not stored
        y, _, inverse_rms = kernels.rmsnorm_fwd(
            rows, weight, eps, None, None, TE_DType[x.dtype], SM_MARGIN, False
        )
        ctx.save_for_backward(rows, weight, inverse_rms)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, inverse_rms = ctx.saved_tensors
        grad_rows = grad.contiguous().view(rows.shape)
        dx, dw = kernels.rmsnorm_bwd(grad_rows, rows, inverse_rms, weight, SM_MARGIN, False)
        return dx.view(grad.shape), dw, None


class _LayerNorm1p(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        rows = x.contiguous().view(-1, x.shape[-1])
        # ..., no output tensor, no quantizer, dtype of the output, ..., weight - 1 is stored
        y, mean, inverse_std = kernels.layernorm_fwd(
            rows, weight, bias, eps, None, None, TE_DType[x.dtype], SM_MARGIN, True
        )
        ctx.save_for_backward(rows, weight, mean, inverse_std)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, mean, inverse_std = ctx.saved_tensors
        grad_rows = grad.contiguous().view(rows.shape)
        dx, dw, db = kernels.layernorm_bwd(grad_rows, rows, mean, inverse_std, weight, SM_MARGIN, True)
        return dx.view(grad.shape), dw, db, None


class _BulkOverlap(te.Linear):
    """Linear layer that also overlaps the communication of its backward pass.

    Megatron-Core (0.16 to 0.19) passes these settings to LayerNormLinear only. Without them the
    gradients of linear_qkv and linear_fc1 wait for a reduce-scatter and an all-gather, although
    their buffers are allocated.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        config = self.config  # Megatron's subclass has set it
        if config.tp_comm_overlap:
            kwargs["ub_bulk_dgrad"] = config.tp_comm_bulk_dgrad
            kwargs["ub_bulk_wgrad"] = config.tp_comm_bulk_wgrad
            kwargs["ub_overlap_rs_dgrad"] = config.tp_comm_overlap_rs_dgrad
        super().__init__(*args, **kwargs)


class OverlappedColumnParallelLinear(TEColumnParallelLinear, _BulkOverlap):
    """Megatron's column-parallel layer of Transformer Engine, with all overlaps of tp_comm_overlap."""
