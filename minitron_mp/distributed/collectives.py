"""Collectives that Megatron-Core does not have. Every rank of the group must call them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class AllGatherSequence(torch.autograd.Function):
    """Gather x [s/cp, ...] of each rank into [cp, s/cp, ...] on all ranks.

    The backward pass is a reduce-scatter of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        out = x.new_empty((group.size(), *x.shape))
        dist.all_gather_into_tensor(out.view(-1, *x.shape[1:]), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        out = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous().view(-1, *grad.shape[2:]), group=ctx.group)
        return out, None


def context_parallel_slice(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Return this rank's part of a sequence: chunks r and 2n-1-r of 2n, for rank r of n.

    This is Megatron's zig-zag order, which balances causal attention over the ranks.
    """
    n, r = group.size(), group.rank()
    if n == 1:
        return x
    chunks = x.chunk(2 * n, dim)
    return torch.cat([chunks[r], chunks[2 * n - 1 - r]], dim)


def exchange_kept(
    x: torch.Tensor, dim: int, keep: torch.Tensor, start: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """Return this rank's share of the kept rows of a tensor that is split along dim.

    x [.., n/tp, ..]: this rank's part, global rows from `start` on.
    keep [k]: kept global rows, ascending, equal on all ranks; tp divides k.
    Returns [.., k/tp, ..]: kept rows r*k/tp to (r+1)*k/tp on rank r.

    The tensor is not gathered. Each rank sends only kept rows, to the rank that holds them
    afterwards. They arrive in the right order, because keep is ascending. If no row changes its
    rank, the function does not communicate.
    """
    size, rank, part = group.size(), group.rank(), x.shape[dim]
    assert keep.numel() % size == 0, (keep.numel(), size)
    is_local = (keep >= start) & (keep < start + part)
    index = (keep[is_local] - start).to(x.device)
    per_rank = keep.numel() // size
    owner_after = torch.arange(keep.numel()) // per_rank
    owner_before = keep // part
    if torch.equal(owner_before, owner_after):
        return x.index_select(dim, index)
    kept = x.transpose(0, dim).index_select(0, index)
    send = torch.bincount(owner_after[is_local], minlength=size).tolist()
    receive = torch.bincount(owner_before[owner_after == rank], minlength=size).tolist()
    out = kept.new_empty((per_rank, *kept.shape[1:]))
    dist.all_to_all_single(out, kept, receive, send, group=group)
    return out.transpose(0, dim)
