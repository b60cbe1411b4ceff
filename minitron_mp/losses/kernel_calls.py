"""Row functions of the distillation loss for CUDA: they start the Triton kernels of kernels.py
and row_kernels.py.

Arguments and results are the same as in torch_rows.py. Logits must be contiguous within a row; rows
may have any stride. No function synchronises with the device.

With a top-k teacher the student's logits are overwritten: those of the k tokens become -inf, and
RankStatistics.top_logits has their values.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from minitron_mp.losses import kernels, row_kernels
from minitron_mp.losses.parameters import PARAMETERS
from minitron_mp.losses.rows import LogitRows, RankStatistics, RowStatistics, RowValues

BLOCK, WARPS = 1024, 8
"""Each thread has four columns: 16 bytes of float32 in one load. So it uses at most 48 registers,
and 132 multiprocessors (sm_90) work on 660 rows at a time: a tile of 512 rows is one wave. With eight
columns there are 64 to 99 registers, and some tiles need a second wave
(benchmarks/kd_loss_parts.py)."""

SMALL_WARPS = 1
"""Of kernels that read a few numbers per row."""


def statistics(rows: LogitRows) -> RankStatistics:
    """Return the result of torch_rows.statistics(), without the exponentials of plain torch."""
    student, teacher, t = rows.student, _teacher(rows), rows.temperature
    table = _float32(student, len(student), len(RowStatistics._fields))
    top_logits = None
    if rows.top_k is not None:
        top_logits = _take_top(student, rows.top_k.columns, rows.valid)
    columns, logits, log_probs, k = _top(rows, top_logits)
    kernels._statistics[(len(student),)](
        student,
        teacher,
        rows.labels.contiguous(),
        columns,
        logits,
        log_probs,
        table,
        *_sizes(student, teacher),
        rows.valid,
        k,
        t,
        1 / t,
        HOT=t != 1,
        TEACHER=rows.teacher is not None,
        TOP=rows.top_k is not None,
        DIVERGENCE=rows.divergence,
        BLOCK=_block(student),
        num_warps=WARPS,
    )
    return RankStatistics(table, top_logits=top_logits)


def second_sums(rows: LogitRows, tables: Tensor) -> Tensor:
    """Return the result of torch_rows.second_sums()."""
    student, teacher = rows.student, _teacher(rows)
    sums = _float32(student, len(student), row_kernels.NUM_SECOND_SUMS.value)
    kernels._second_sums[(len(student),)](
        student,
        teacher,
        tables,
        sums,
        *_sizes(student, teacher),
        rows.valid,
        len(student),
        len(tables),
        1 / rows.temperature,
        **_parameters(rows),
        DIVERGENCE=rows.divergence,
        RANKS=triton.next_power_of_2(len(tables)),
        BLOCK=_block(student),
        num_warps=WARPS,
    )
    return sums


def finish(
    rows: LogitRows,
    own: RankStatistics,
    tables: Tensor,
    second_sums: Tensor | None,
    losses: Tensor,
    gradient: Tensor | None,
) -> None:
    """Write the results of torch_rows.finish()."""
    values = _row_values(rows, tables, second_sums, losses)
    if gradient is not None:
        _gradient(rows, values, own.top_logits, gradient)


def lse_without(logits: Tensor, columns: Tensor, temperature: float) -> Tensor:
    """Return log sum e^(z / temperature) over all columns but the given ones, float32 [n, 1].

    logits [n, v/tp] are overwritten. columns int64 [n, k]; those outside of the logits are ignored.
    """
    table = _float32(logits, len(logits), len(RowStatistics._fields))
    _take_top(logits, columns, logits.shape[1])
    no_label = columns.new_full((len(logits),), -1)
    kernels._statistics[(len(logits),)](
        logits,
        logits,
        no_label,
        *(no_label, table, table),  # not read
        table,
        *_sizes(logits, logits),
        logits.shape[1],
        0,
        temperature,
        1 / temperature,
        HOT=False,
        TEACHER=False,
        TOP=False,
        DIVERGENCE="forward_kl",
        BLOCK=_block(logits),
        num_warps=WARPS,
    )
    sums = RowStatistics.unpacked(table)
    return (sums.student_max + sums.student_sum.log())[:, None]


def _take_top(logits: Tensor, columns: Tensor, valid: int) -> Tensor:
    """Return the logits [n, k] of the columns, in float32, and replace them by -inf."""
    taken = _float32(logits, *columns.shape)
    row_kernels._take_top[(len(logits),)](
        logits,
        columns.contiguous(),
        taken,
        _stride(logits),
        valid,
        columns.shape[1],
        BLOCK=_block(columns),
        num_warps=SMALL_WARPS,
    )
    return taken


def _row_values(rows: LogitRows, tables: Tensor, second_sums: Tensor | None, losses: Tensor) -> Tensor:
    """Write the losses [3, n] and return a table [n, 6] with the fields of RowValues."""
    num_rows, objective = len(rows.student), rows.objective
    values = _float32(tables, num_rows, len(RowValues._fields))
    _, _, log_probs, k = _top(rows, None)
    row_kernels._row_values[(num_rows,)](
        tables,
        tables if second_sums is None else second_sums,
        rows.token_weights.contiguous(),
        log_probs,
        log_probs if rows.top_k is None else rows.top_k.log_ghost.contiguous(),
        values,
        losses,
        _stride(losses),
        num_rows,
        len(tables),
        k,
        rows.temperature,
        objective.kl_weight,
        objective.ce_weight,
        TEACHER=rows.teacher is not None,
        TOP=rows.top_k is not None,
        DIVERGENCE=rows.divergence,
        RANKS=triton.next_power_of_2(len(tables)),
        BLOCK=_block(log_probs),
        num_warps=SMALL_WARPS,
    )
    return values


def _gradient(rows: LogitRows, values: Tensor, top_logits: Tensor | None, out: Tensor) -> None:
    student, teacher, block = rows.student, _teacher(rows), _block(out)
    has_ce = rows.objective.ce_weight > 0
    labels = rows.labels.contiguous()
    kernels._gradient[(len(out), triton.cdiv(out.shape[1], block))](
        student,
        teacher,
        out,
        values,
        labels,
        *_sizes(student, teacher),
        _stride(out),
        rows.valid,
        1 / rows.temperature,
        **_parameters(rows),
        HOT=rows.temperature != 1,
        TEACHER=rows.teacher is not None,
        TOP=rows.top_k is not None,
        CE=has_ce,
        DIVERGENCE=rows.divergence,
        BLOCK=block,
        num_warps=WARPS,
    )
    if rows.top_k is not None:
        columns, logits, log_probs, k = _top(rows, top_logits)
        row_kernels._put_top[(len(out),)](
            out,
            values,
            labels,
            columns,
            logits,
            log_probs,
            _stride(out),
            rows.valid,
            k,
            1 / rows.temperature,
            CE=has_ce,
            BLOCK=_block(columns),
            num_warps=SMALL_WARPS,
        )


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _teacher(rows: LogitRows) -> Tensor:
    """Return the teacher's logits, or without a teacher a tensor that the kernel does not read."""
    return rows.student if rows.teacher is None else rows.teacher


def _top(rows: LogitRows, logits: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return columns, student's logits and log probabilities of the k tokens, and k.

    Without a top-k teacher, k is 0 and the kernels do not read the tensors.
    """
    if rows.top_k is None:
        labels = rows.labels[:, None]
        weights = rows.token_weights[:, None]
        return labels, weights, weights, 0
    columns, log_probs = rows.top_k.columns.contiguous(), rows.top_k.log_probs.contiguous()
    return columns, log_probs if logits is None else logits, log_probs, columns.shape[1]


def _parameters(rows: LogitRows) -> dict[str, float]:
    """Return the parameters of all divergences by name, as arguments of the kernels.

    Parameters of other divergences are 0. The kernels do not read them.
    """
    names = {name for declared in PARAMETERS.values() for name in declared}
    return {name: rows.parameters.get(name, 0.0) for name in names}


def _block(z: Tensor) -> int:
    return min(BLOCK, triton.next_power_of_2(z.shape[1]))


def _sizes(z_s: Tensor, z_t: Tensor) -> tuple[int, int, int, int]:
    """Return strides and widths of the logits.

    Loads are masked at the padded width. When it is a multiple of 16, the compiler reads 16 bytes
    at a time for any vocabulary size.
    """
    return _stride(z_s), _stride(z_t), z_s.shape[1], z_t.shape[1]


def _stride(z: Tensor) -> int:
    assert z.stride(1) == 1, "the columns of a row must be contiguous"
    return z.stride(0)
