"""Batch: the type of one microbatch in data loading, schedules and losses."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class Batch(TypedDict, total=False):
    """One microbatch: complete sequences [b, s] on the host, or a rank's part (local_batch())."""

    tokens: Tensor
    """int64."""
    labels: Tensor
    """int64, the tokens shifted by one."""
    position_ids: Tensor
    """int64."""
    loss_mask: Tensor
    """float32, 1 for valid tokens."""
    documents: Tensor
    """int64, number of the document of each token. All ranks have complete sequences. Tokens attend
    only to their document. Without it they attend to all earlier tokens."""
    teacher_signal: object
    """distillation.teacher.TeacherSignal; read it with signal_of()."""
    rows: Tensor
    """int64 [b], numbers of the scored rows, not split. Only evaluation.log_likelihood sets it."""
    index: int
    """Position among the microbatches of a step. Only training.teacher_correction sets it."""
