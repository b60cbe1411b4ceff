"""The teacher as a source of signals: for each microbatch of a step, what the loss on the student's last stage needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from minitron_mp.arch import Arch
from minitron_mp.checkpoint import load_model
from minitron_mp.losses import TeacherHidden
from minitron_mp.model import build_model, output_weight
from minitron_mp.parallel import World
from minitron_mp.schedule import Batch, run


class ColocatedTeacher:
    """A frozen teacher on the student's ranks, in the student's layout.

    Its forward-only schedule runs the microbatches of a step first and leaves, on the last stage, the hidden states after the
    final norm: 2h bytes a token in bf16. The loss applies the teacher's head one microbatch at a time.
    """

    def __init__(self, arch: Arch, checkpoint: Path, world: World, *, precision: str, sequence_length: int):
        self.world = world
        self.chunks = build_model(arch, world, precision=precision, sequence_length=sequence_length)
        load_model(self.chunks, checkpoint, world)
        for chunk in self.chunks:
            chunk.eval().requires_grad_(False)

    def signals(self, batches: Sequence[Batch]) -> list[Tensor | None]:
        """One entry a microbatch: hidden [s', b, h] on the last stage (s' as schedule.run says), None elsewhere."""
        hidden = run(self.chunks, batches, self.world, lambda hidden, _: hidden)
        return hidden if self.world.is_last_stage else [None] * len(batches)

    def target(self, signal: Any) -> TeacherHidden:
        """What the loss takes, on the last stage."""
        return TeacherHidden(signal, output_weight(self.chunks[-1]))


def with_signals(teacher: Any, batches: Sequence[Batch]) -> list[Batch]:
    """The microbatches with the teacher's signal of each under "teacher"; without a teacher, as they are."""
    if teacher is None:
        return list(batches)
    return [{**batch, "teacher": signal} for batch, signal in zip(batches, teacher.signals(batches))]
