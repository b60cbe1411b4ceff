"""Matrix products and tensor-parallel communication of the distillation loss.

s sequence  b microbatch  h hidden  v padded vocabulary  n rows (s b)
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mp.losses.rows import RowStatistics

Statistics = TypeVar("Statistics", Tensor, RowStatistics)


def gather_rows(x: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """Return [s', b, m] as rows [s b, m], gathered over the group when s' is not num_tokens."""
    x = x.detach()
    if x.shape[0] != num_tokens:
        gathered = x.new_empty((num_tokens, *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        x = gathered
    return x.reshape(-1, x.shape[-1])


def gather_statistics(x: Statistics, group: dist.ProcessGroup) -> Statistics:
    """Return [n, k] as [tp, n, k], or statistics [n] as [tp, n], of all ranks of the group."""
    if isinstance(x, RowStatistics):
        return RowStatistics(*gather_statistics(torch.stack(x, 1), group).unbind(-1))
    if group.size() == 1:
        return x[None]
    gathered = x.new_empty((group.size(), *x.shape))
    dist.all_gather_into_tensor(gathered.view(-1, x.shape[1]), x.contiguous(), group=group)
    return gathered


def reduce_hidden_gradient(dx: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
    """Sum [s, b, h] over the group; return the rank's part when `length` is s/tp."""
    if length != dx.shape[0]:
        part = dx.new_empty((length, *dx.shape[1:]))
        dist.reduce_scatter_tensor(part, dx, group=group)
        return part
    if group.size() > 1:
        dist.all_reduce(dx, group=group)
    return dx


def for_product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight as product(x, weight, dtype) takes it, converted once for all rows.

    It is converted where no kernel multiplies these dtypes into that one: a GPU multiplies bf16
    into float32, a CPU does not.
    """
    widens = x.is_cuda and x.dtype == weight.dtype and dtype is torch.float32
    return weight if widens else weight.to(dtype)


def product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x weight^T in dtype, accumulated in float32. weight: of for_product()."""
    if weight.dtype == dtype:
        return torch.mm(x.to(dtype), weight.t())
    return torch.mm(x, weight.t(), out_dtype=dtype)


def add_weight_gradient(dw: Tensor, dz: Tensor, x: Tensor) -> None:
    """Add dz^T x to dw [v/tp, h]."""
    if dw.dtype == dz.dtype:
        dw.addmm_(dz.t(), x)
    elif dz.is_cuda:
        torch.addmm(dw, dz.t(), x, out_dtype=dw.dtype, out=dw)
    else:
        dw += torch.mm(dz.t(), x)
