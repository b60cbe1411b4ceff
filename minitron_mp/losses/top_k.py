"""Forward KL to the teacher's k most likely tokens and one ghost token.

The ghost token has the probability of all remaining tokens.

    p, q        probabilities of teacher and student at the temperature t
    gradient    t (q - p) on the k tokens, t q (1 - p_ghost / q_ghost) on the remaining tokens

q / q_ghost is the softmax over the remaining tokens alone. The divergence is a lower bound of the
full forward KL. TopKRows uses plain torch on every device, because k entries per row are too little
work for a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minitron_mp.losses.divergences import DivergenceValue, add_cross_entropy
from minitron_mp.losses.objective import TeacherTopK
from minitron_mp.losses.rows import LogitRows, RowStatistics, RowSums, RowValues
from minitron_mp.losses.torch_rows import write_gradient

LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class TopKRows:
    """The k tokens of n rows.

    columns int64 [n, k]: columns on this rank. A token of another rank has the column after the
    last one. log_probs float32 [n, k]. log_ghost float32 [n].
    """

    columns: Tensor
    log_probs: Tensor
    log_ghost: Tensor

    @classmethod
    def of(cls, target: TeacherTopK, rows: LogitRows, first_column: int) -> TopKRows:
        """Return the target of these rows. first_column: vocabulary id of this rank's column 0."""
        num_columns = rows.student.shape[1]
        columns = target.indices - first_column
        is_here = (columns >= 0) & (columns < rows.valid)
        columns = torch.where(is_here, columns, num_columns)
        return cls(columns, target.log_probs, target.log_ghost[:, 0])

    def add_statistics(self, rows: LogitRows, statistics: RowStatistics) -> RowStatistics:
        """Return the student's statistics with this teacher's fields filled in.

        teacher_max, teacher_sum: the student's softmax sum over the remaining tokens. It is summed
        over them, because one minus the k probabilities would lose precision. cross_sum: sum of p s
        over the k tokens.
        """
        s = rows.student[:, : rows.valid].float() / rows.temperature
        padding = self._padding(rows)
        remaining = F.pad(s, padding, value=-torch.inf).scatter_(1, self.columns, -torch.inf)
        peak = remaining.amax(1).clamp_min(LOWEST)  # finite also when no token remains
        return statistics._replace(
            teacher_max=peak,
            teacher_sum=torch.exp(remaining - peak[:, None]).sum(1),
            cross_sum=(self.log_probs.exp() * F.pad(s, padding).gather(1, self.columns)).sum(1),
        )

    def value(self, sums: RowSums) -> DivergenceValue:
        """Return the divergence and the teacher's probability of the ghost, for the gradient."""
        p, remaining_lse, student_lse = self.log_probs.exp(), sums.teacher.lse, sums.student.lse
        has_ghost = (self.log_ghost > -torch.inf) & (remaining_lse > -torch.inf)
        ghost_gap = self.log_ghost - remaining_lse + student_lse
        ghost = torch.where(has_ghost, self.log_ghost.exp() * ghost_gap, 0.0)
        entropy = torch.where(p > 0, p * self.log_probs, 0.0).sum(1)
        divergence = entropy - sums.by_rank.cross_sum.sum(0) + p.sum(1) * student_lse + ghost
        return DivergenceValue(divergence, self.log_ghost.exp())

    def gradient(self, rows: LogitRows, values: RowValues, has_ce: bool, out: Tensor) -> None:
        """Write the gradient of the weighted loss into out [n, v/tp], as torch_rows.gradient() does.

        values.teacher_lse: log sum e^s of the remaining tokens. values.gradient_constant: second
        result of value().
        """
        if rows.valid == 0:
            out.zero_()
            return
        s = rows.student[:, : rows.valid].float() / rows.temperature
        padding = self._padding(rows)
        q = F.pad(torch.exp(s - values.student_lse[:, None]), padding)
        remaining_softmax = F.pad(torch.exp(s - values.teacher_lse[:, None]), padding)
        top_gradient = q.gather(1, self.columns) - self.log_probs.exp()
        total = (q - remaining_softmax * values.gradient_constant[:, None]).scatter_(
            1, self.columns, top_gradient
        )
        total = total[:, : rows.valid] * values.kl_weight[:, None]
        if has_ce:
            total = add_cross_entropy(total, rows, values)
        write_gradient(total, rows, values, has_ce, out)

    def _padding(self, rows: LogitRows) -> tuple[int, int]:
        """Return (0, number of columns after the valid ones, with the column for other ranks)."""
        return 0, rows.student.shape[1] + 1 - rows.valid


def top_k_of(
    logits: Tensor, k: int, vocab_size: int, group: dist.ProcessGroup, temperature: float
) -> TeacherTopK:
    """Return the k most likely tokens and the probability of the rest, from logits [..., v/tp].

    All ranks of the tensor-parallel group must call the function. They get the same result.
    """
    num_columns = logits.shape[-1]
    first_column = group.rank() * num_columns
    z = logits.float() / temperature
    z[..., max(0, vocab_size - first_column) :] = -torch.inf
    values, indices = z.topk(min(k, num_columns), dim=-1)
    values, order = _gather_last(values, group).topk(k, dim=-1)
    indices = _gather_last(indices + first_column, group).gather(-1, order)
    # The rest is summed, because one minus the k probabilities would lose precision. Tokens of
    # other ranks use an extra column.
    columns = indices - first_column
    columns = torch.where((columns >= 0) & (columns < num_columns), columns, num_columns)
    rest = F.pad(z, (0, 1), value=-torch.inf).scatter_(-1, columns, -torch.inf)
    rest = torch.logsumexp(_gather_last(torch.logsumexp(rest, -1, keepdim=True), group), -1, keepdim=True)
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
