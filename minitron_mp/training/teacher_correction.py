"""Teacher correction during distillation: the teacher is trained on the text at the same time.

2408.11796, figure 5: two orders give equally good students. Either the teacher is corrected first,
or the original is pruned and corrected during distillation. In each step the student distils from
the teacher's weights before the teacher's update, on the same microbatches. One forward pass of
the teacher gives both results: its hidden states are the signal, and its cross-entropy gives the
gradients. The student's loss applies the teacher's output layer later, so the teacher's update
waits until the signals are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from minitron_mp.artifacts.checkpoint import prefixed
from minitron_mp.distillation.stream_layout import Traffic
from minitron_mp.distillation.teacher import TeacherSignal, microbatch_numbers
from minitron_mp.distributed.batch import Batch
from minitron_mp.losses.objective import TeacherHidden, TeacherTarget
from minitron_mp.models.sharded_model import output_weight, unwrap
from minitron_mp.training.run import TrainingRun

PREFIX = "teacher."
"""Prefix of the teacher's keys in the student's checkpoints."""


class TrainableTeacher:
    """A colocated teacher in training. It is a Teacher, and the extra state of the student's run.

    run: training run of the teacher, without a checkpoint folder. After run.settings.steps steps
    the teacher is frozen.
    """

    pairs = None
    stream_end = None

    def __init__(self, run: TrainingRun):
        self.run, self.world, self.model = run, run.world, run.model
        self.update_is_due = False
        """Whether accumulated gradients wait for the optimizer."""

    def signals(self, batches: Sequence[Batch], step: int) -> list[TeacherSignal]:
        self._update_if_due()
        hidden: list[Tensor | None] = [None] * len(batches)
        numbered: list[Batch] = [{**batch, "index": index} for index, batch in enumerate(batches)]
        trains = self.run.steps_done < self.run.settings.steps

        def on_output(output: Tensor, batch: Batch) -> object:
            hidden[batch["index"]] = output.detach()
            return self.run.loss(output, batch) if trains else None

        if trains:
            self.run.forward_backward(numbered, on_output)
        else:
            self.model.forward(numbered, on_output)
        self.update_is_due = trains
        return list(map(TeacherSignal, microbatch_numbers(len(batches), step, self.world), hidden))

    def target(self, signal: TeacherSignal) -> TeacherTarget:
        assert signal.hidden is not None
        return TeacherHidden(signal.hidden, output_weight(unwrap(self.model.last_chunk)))

    def hidden_states(self, signal: TeacherSignal) -> Sequence[Tensor]:
        return signal.states

    def release(self, signal: TeacherSignal) -> None: ...

    def traffic(self) -> Traffic | None:
        return None

    def close(self) -> None:
        """Run the teacher's last update and log it."""
        self._update_if_due()
        self.run.log()
        self.run.finalize()

    def state_dict(self, *, empty: bool = False) -> dict[str, Any]:
        """Return the teacher's sharded state, for the student's checkpoint.

        Reached by all ranks.
        """
        self._update_if_due()
        self.run.log()
        return prefixed(self.run.state_dict(empty=empty), PREFIX)

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Restore the state in a checkpoint of the student after `step`."""
        self.run.load_state(state, min(step, self.run.settings.steps))

    def _update_if_due(self) -> None:
        if self.update_is_due:
            self.update_is_due = False
            self.run.update()
            if self.run.log_is_due:
                self.run.log()
