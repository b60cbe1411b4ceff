"""The teacher as a source of signals: for each microbatch of a step, what the loss on the student's last stage needs.

Two placements behind one interface (signals, target, release; states, where losses inside the student want some). ColocatedTeacher
runs on the student's ranks, in the student's layout. RemoteTeacher is the student's view of a teacher on ranks of its own, where
serve() runs, or of what one left on disk; stream.py and cache.py carry the signals.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minitron_mp.losses.fused import TeacherTopK


def top_k_of(z: Tensor, k: int, vocab_size: int, group: Any, temperature: float) -> TeacherTopK:
    """The k most likely tokens and the mass of the rest from logits [..., v/tp], at a temperature; equal on all ranks of the group."""
    columns, first = z.shape[-1], group.rank() * z.shape[-1]
    z = z.float() / temperature
    z[..., max(0, vocab_size - first) :] = -torch.inf
    values, indices = z.topk(min(k, columns), dim=-1)
    values, order = _gather_last(values, group).topk(k, dim=-1)
    indices = _gather_last(indices + first, group).gather(-1, order)
    # The rest is summed: one minus the k would cancel. Tokens of other ranks go to a column behind the last.
    place = indices - first
    rest = F.pad(z, (0, 1), value=-torch.inf).scatter_(
        -1, torch.where((place >= 0) & (place < columns), place, columns), -torch.inf
    )
    rest = torch.logsumexp(_gather_last(torch.logsumexp(rest, -1, keepdim=True), group), -1, keepdim=True)
    total = torch.logaddexp(torch.logsumexp(values, -1, keepdim=True), rest)
    return TeacherTopK(indices, values - total, rest - total)


def _gather_last(x: Tensor, group: Any) -> Tensor:
    """[..., n] of each rank -> [..., tp n]."""
    if group.size() == 1:
        return x
    parts = x.new_empty((group.size(), *x.shape))
    dist.all_gather_into_tensor(parts.view(-1, *x.shape[1:]), x.contiguous(), group=group)
    return torch.cat(list(parts), -1)


def pack_top_k(top: TeacherTopK) -> Tensor:
    """int32 [s, b, 2k + 1]: the bits of log_probs and log_ghost, and the indices."""
    return torch.cat(
        [top.log_probs.view(torch.int32), top.log_ghost.view(torch.int32), top.indices.int()], -1
    )


def unpack_top_k(packed: Tensor) -> TeacherTopK:
    k = packed.shape[-1] // 2
    log_probs, log_ghost, indices = packed.split([k, 1, k], -1)
    return TeacherTopK(
        indices.long(), log_probs.contiguous().view(torch.float32), log_ghost.contiguous().view(torch.float32)
    )
