"""Row functions of the distillation loss for CUDA: they start the Triton kernels of kernels.py.

Arguments and results are the same as in torch_rows.py. Logits must be contiguous within a row; rows
may have any stride. No function synchronises with the device.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from minitron_mp.losses import kernels
from minitron_mp.losses.parameters import PARAMETERS
from minitron_mp.losses.rows import Exponentials, LogitRows, RowStatistics, RowValues

BLOCK, WARPS = 2048, 8
"""Each thread has eight columns: 16 bytes of bf16 in one load. It uses 64 registers, so a
multiprocessor works on four rows at a time (sm_90)."""


def statistics(rows: LogitRows, divergence: str) -> tuple[RowStatistics, Exponentials | None]:
    """Return the result of torch_rows.statistics(), with None for the exponentials."""
    student, teacher, t = rows.student, _teacher(rows), rows.temperature
    table = torch.empty(
        (len(student), len(RowStatistics._fields)), dtype=torch.float32, device=student.device
    )
    kernels._statistics[(len(student),)](
        student,
        teacher,
        rows.labels.contiguous(),
        table,
        *_sizes(student, teacher),
        rows.valid,
        t,
        1 / t,
        HOT=t != 1,
        TEACHER=rows.teacher is not None,
        DIVERGENCE=divergence,
        BLOCK=_block(student),
        num_warps=WARPS,
    )
    return RowStatistics(*table.unbind(1)), None


def second_sums(rows: LogitRows, divergence: str, student_lse: Tensor, teacher_lse: Tensor) -> Tensor:
    """Return the result of torch_rows.second_sums()."""
    student, teacher = rows.student, _teacher(rows)
    sums = torch.empty((len(student), 3), dtype=torch.float32, device=student.device)
    kernels._second_sums[(len(student),)](
        student,
        teacher,
        student_lse.contiguous(),
        teacher_lse.contiguous(),
        sums,
        *_sizes(student, teacher),
        rows.valid,
        1 / rows.temperature,
        **_parameters(rows),
        DIVERGENCE=divergence,
        BLOCK=_block(student),
        num_warps=WARPS,
    )
    return sums


def gradient(
    rows: LogitRows,
    statistics: RowStatistics,
    exponentials: Exponentials | None,
    values: RowValues,
    divergence: str,
    has_ce: bool,
    out: Tensor,
) -> None:
    """Write the result of torch_rows.gradient() into out, which may be the student's logits."""
    student, teacher, block = rows.student, _teacher(rows), _block(out)
    kernels._gradient[(len(out), triton.cdiv(out.shape[1], block))](
        student,
        teacher,
        out,
        torch.stack(values, 1),
        rows.labels.contiguous(),
        *_sizes(student, teacher),
        _stride(out),
        rows.valid,
        1 / rows.temperature,
        **_parameters(rows),
        HOT=rows.temperature != 1,
        TEACHER=rows.teacher is not None,
        CE=has_ce,
        DIVERGENCE=divergence,
        BLOCK=block,
        num_warps=WARPS,
    )


def _teacher(rows: LogitRows) -> Tensor:
    """Return the teacher's logits, or without a teacher a tensor that the kernel does not read."""
    return rows.student if rows.teacher is None else rows.teacher


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
