"""Teacher correction at the same time as distillation: the teacher learns the distillation text while it teaches it.

2408.11796, figure 5: pruning the original teacher and distilling from one that is corrected meanwhile is as good as correcting it first. Each
step of the student is one of the teacher's, on the same microbatches: the hidden states that its forward pass leaves are the signal, then it
takes its own step by cross-entropy. The student's loss applies the teacher's output layer later, so that step waits until the signals are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from minitron_mp.artifacts.checkpoint import prefixed
from minitron_mp.distillation.stream_layout import Traffic
from minitron_mp.distillation.teacher import TeacherSignal, microbatch_numbers
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.schedule import run_schedule
from minitron_mp.losses.fused import TeacherHidden, TeacherTarget
from minitron_mp.models.build import output_weight, unwrap
from minitron_mp.training.run import TrainingRun

PREFIX = "teacher."
"""Of the teacher's keys in the student's checkpoints."""


class TrainableTeacher:
    """A colocated teacher (teacher.py) in training; after training.settings.steps it stays as it is. training: its Run, without checkpoints."""

    pairs = None
    stream_end = None

    def __init__(self, training: TrainingRun):
        self.training, self.world, self.chunks = training, training.world, training.models
        self.due = False
        """Whether gradients wait for the optimizer."""

    def signals(self, batches: Sequence[Batch], step: int) -> list[TeacherSignal]:
        self._take_step()
        hidden: list[Any] = [None] * len(batches)
        numbered: list[Batch] = [{**batch, "index": index} for index, batch in enumerate(batches)]
        learning = self.training.done < self.training.settings.steps

        def catch(output: Any, batch: Batch) -> Any:
            hidden[batch["index"]] = output.detach()
            return self.training.loss(output, batch) if learning else None

        if learning:
            self.training.accumulate(numbered, catch)
        else:
            run_schedule(self.chunks, numbered, self.world, catch)
        self.due = learning
        return list(map(TeacherSignal, microbatch_numbers(len(batches), step, self.world), hidden))

    def target(self, signal: TeacherSignal) -> TeacherTarget:
        assert signal.hidden is not None
        return TeacherHidden(signal.hidden, output_weight(unwrap(self.chunks[-1])))

    def hidden_states(self, signal: TeacherSignal) -> Sequence[Tensor]:
        return signal.states

    def release(self, signal: TeacherSignal) -> None: ...

    def traffic(self) -> Traffic | None:
        return None

    def close(self) -> None:
        """The run is done with the teacher: its last step, and the rest of its log."""
        self._take_step()
        if self.training.pending:
            self.training.log()
        self.training.settle()

    def sharded(self, *, empty: bool = False) -> dict[str, Any]:
        """For the student's checkpoint; reached by all ranks."""
        self._take_step()
        if self.training.pending:  # logged, and so checked, before it is saved
            self.training.log()
        return prefixed(self.training.sharded(empty=empty), PREFIX)

    def fill(self, state: dict[str, Any], step: int) -> None:
        """Take over what sharded() left at a step of the student."""
        self.training.fill(state, min(step, self.training.settings.steps))

    def _take_step(self) -> None:
        if self.due:
            self.due = False
            self.training.update()
