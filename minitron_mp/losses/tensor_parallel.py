"""Matrix products and tensor-parallel communication of the distillation loss.

s sequence  b microbatch  h hidden  v padded vocabulary  n rows (s b)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(x: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """Return x [s', b, m] as rows [s b, m]; gather it over the group if s' is not num_tokens."""
    x = x.detach()
    if x.shape[0] != num_tokens:
        gathered = x.new_empty((num_tokens, *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        x = gathered
    return x.reshape(-1, x.shape[-1])


def gather_table(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather x [n, k] of all ranks into [tp, n, k]."""
    if group.size() == 1:
        return x[None]
    gathered = x.new_empty((group.size(), *x.shape))
    dist.all_gather_into_tensor(gathered.view(-1, x.shape[1]), x.contiguous(), group=group)
    return gathered


def reduce_hidden_gradient(dx: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of dx [s, b, h] over the group; only this rank's part if `length` is s/tp."""
    if length != dx.shape[0]:
        part = dx.new_empty((length, *dx.shape[1:]))
        dist.reduce_scatter_tensor(part, dx, group=group)
        return part
    if group.size() > 1:
        dist.all_reduce(dx, group=group)
    return dx


def for_product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in the dtype that product(x, weight, dtype) needs.

    A GPU has a matrix product from bf16 inputs to a float32 result. A CPU has none, so there the
    weight is converted, once for all rows.
    """
    has_mixed_product = x.is_cuda and x.dtype == weight.dtype and dtype is torch.float32
    return weight if has_mixed_product else weight.to(dtype)


def product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x weight^T in dtype, accumulated in float32. weight: result of for_product()."""
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
