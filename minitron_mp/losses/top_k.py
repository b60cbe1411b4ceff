"""Forward KL to the teacher's k most likely tokens and one ghost token.

The ghost token has the probability of all remaining tokens.

    p, q        probabilities of teacher and student at the temperature t
    gradient    t (q - p) on the k tokens, t q (1 - p_ghost / q_ghost) on the remaining tokens

q / q_ghost is the softmax over the remaining tokens alone. The divergence is a lower bound of the
full forward KL.

The row functions in this file are plain torch, for CPUs. kernel_calls.py has them for GPUs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minitron_mp.losses.divergences import DivergenceValue, add_cross_entropy
from minitron_mp.losses.objective import TeacherTopK
from minitron_mp.losses.rows import LogitRows, RowStatistics, RowSums, RowValues, TopK

LOWEST = torch.finfo(torch.float32).min


def add_statistics(rows: LogitRows, top: TopK, statistics: RowStatistics) -> RowStatistics:
    """Return the student's statistics with this teacher's fields filled in.

    teacher_max, teacher_sum: the student's softmax sum over the remaining tokens. It is summed over
    them, because one minus the k probabilities would lose precision. cross_sum: sum of p s over the
    k tokens.
    """
    s = rows.student[:, : rows.valid].float() / rows.temperature
    columns, padding = _columns(rows, top), _padding(rows)
    remaining = F.pad(s, padding, value=-torch.inf).scatter_(1, columns, -torch.inf)
    peak = remaining.amax(1).clamp_min(LOWEST)  # finite also when no token remains
    return statistics._replace(
        teacher_max=peak,
        teacher_sum=torch.exp(remaining - peak[:, None]).sum(1),
        cross_sum=(top.log_probs.exp() * F.pad(s, padding).gather(1, columns)).sum(1),
    )


def value(top: TopK, sums: RowSums) -> DivergenceValue:
    """Return the divergence and the teacher's probability of the ghost, for the gradient."""
    p, remaining_lse, student_lse = top.log_probs.exp(), sums.teacher.lse, sums.student.lse
    has_ghost = (top.log_ghost > -torch.inf) & (remaining_lse > -torch.inf)
    ghost_gap = top.log_ghost - remaining_lse + student_lse
    ghost = torch.where(has_ghost, top.log_ghost.exp() * ghost_gap, 0.0)
    entropy = torch.where(p > 0, p * top.log_probs, 0.0).sum(1)
    divergence = entropy - sums.by_rank.cross_sum.sum(0) + p.sum(1) * student_lse + ghost
    return DivergenceValue(divergence, top.log_ghost.exp())


def gradient(rows: LogitRows, top: TopK, values: RowValues, has_ce: bool) -> Tensor:
    """Return the gradient as Divergence.gradient does, float32 [n, valid].

    values.teacher_lse: log sum e^s of the remaining tokens. values.gradient_constant: second result
    of value().
    """
    s = rows.student[:, : rows.valid].float() / rows.temperature
    columns, padding = _columns(rows, top), _padding(rows)
    q = F.pad(torch.exp(s - values.student_lse[:, None]), padding)
    remaining_softmax = F.pad(torch.exp(s - values.teacher_lse[:, None]), padding)
    top_gradient = q.gather(1, columns) - top.log_probs.exp()
    total = (q - remaining_softmax * values.gradient_constant[:, None]).scatter_(1, columns, top_gradient)
    total = total[:, : rows.valid] * values.kl_weight[:, None]
    return add_cross_entropy(total, rows, values) if has_ce else total


def _columns(rows: LogitRows, top: TopK) -> Tensor:
    """Return the columns [n, k]; the one after the last for tokens of other ranks."""
    is_here = (top.columns >= 0) & (top.columns < rows.valid)
    return torch.where(is_here, top.columns, rows.student.shape[1])


def _padding(rows: LogitRows) -> tuple[int, int]:
    """Return (0, number of columns after the valid ones, with the column for other ranks)."""
    return 0, rows.student.shape[1] + 1 - rows.valid


def top_k_of(
    logits: Tensor, k: int, vocab_size: int, group: dist.ProcessGroup, temperature: float
) -> TeacherTopK:
    """Return the k most likely tokens and the probability of the rest, from logits [..., v/tp].

    On a GPU the logits are [n, v/tp] and are overwritten. All ranks of the tensor-parallel group
    must call the function. They get the same result.
    """
    num_columns = logits.shape[-1]
    first_column = group.rank() * num_columns
    z = logits if logits.is_cuda else logits.float() / temperature
    z[..., max(0, vocab_size - first_column) :] = -torch.inf
    values, indices = z.topk(min(k, num_columns), dim=-1)
    values, order = _gather_last(values, group).topk(k, dim=-1)
    indices = _gather_last(indices + first_column, group).gather(-1, order)
    # The rest is summed, because one minus the k probabilities would lose precision.
    columns = indices - first_column
    if logits.is_cuda:
        from minitron_mp.losses.kernel_calls import lse_without

        values = values.float() / temperature
        rest = lse_without(z, columns, temperature)
    else:
        # Tokens of other ranks use an extra column.
        columns = torch.where((columns >= 0) & (columns < num_columns), columns, num_columns)
        rest = F.pad(z, (0, 1), value=-torch.inf).scatter_(-1, columns, -torch.inf)
        rest = torch.logsumexp(rest, -1, keepdim=True)
    rest = torch.logsumexp(_gather_last(rest, group), -1, keepdim=True)
    total = torch.logaddexp(torch.logsumexp(values, -1, keepdim=True), rest)
    return TeacherTopK(indices, values - total, rest - total)


def pack_top_k(top: TeacherTopK) -> Tensor:
    """Return int32 [s, b, 2k + 1]: the bits of log_probs and log_ghost, then the indices."""
    return torch.cat(
        [top.log_probs.view(torch.int32), top.log_ghost.view(torch.int32), top.indices.int()], -1
    )


def unpack_top_k(packed: Tensor) -> TeacherTopK:
    """Return the TeacherTopK that pack_top_k() packed."""
    k = packed.shape[-1] // 2
    log_probs, log_ghost, indices = packed.split([k, 1, k], -1)
    return TeacherTopK(
        indices.long(), log_probs.contiguous().view(torch.float32), log_ghost.contiguous().view(torch.float32)
    )


def _gather_last(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather x [..., n] of each rank into [..., tp n]."""
    if group.size() == 1:
        return x
    parts = x.new_empty((group.size(), *x.shape))
    dist.all_gather_into_tensor(parts.view(-1, *x.shape[1:]), x.contiguous(), group=group)
    return torch.cat(list(parts), -1)
