"""LayerPairs: the pairs of hidden states of student and teacher that are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_mp.config.distillation import HiddenStatesConfig
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.errors import refuse
from minitron_mp.models.arch import Arch


@dataclass(frozen=True)
class LayerPairs:
    """Pairs of hidden states of two models. InputError if a model does not have a state.

    State j is the input of layer j after its input norm. State num_layers is the output of the
    final norm.
    channels [h_s]: the teacher's channels that the student kept. The initial projection has a one
        for each of them. Without channels it has ones on its diagonal.
    """

    settings: HiddenStatesConfig
    student: Arch
    teacher: Arch
    channels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        refuse(
            "these hidden states cannot be matched:",
            self.settings.problems(self.student.num_layers, self.teacher.num_layers),
        )

    def blocks(self, parallel: ParallelConfig) -> dict[int, list[int]]:
        """Return {student stage: blocks of the signal that it needs}, see HiddenStatesConfig."""
        return self.settings.blocks(self.student.num_layers, parallel)

    def routes(self, parallel: ParallelConfig, blocks: dict[int, list[int]]) -> list[tuple[int, int, int]]:
        """Return (teacher state, stage that computes it, stage that needs it) of each pair.

        blocks: {stage: blocks that it needs}, as blocks() returns them.
        parallel: layout that both stage numbers refer to.
        """
        needed_on = {block - 1: stage for stage, numbers in blocks.items() for block in numbers}
        num_layers = self.teacher.num_layers
        return [
            (state, parallel.place_of_state(state, num_layers)[0], needed_on[number])
            for number, (_, state) in enumerate(self.settings.layers)
        ]

    def first_projection(self) -> Tensor | None:
        """Return the initial projection [h_t, h_s], float32, or None when the widths are equal."""
        wide, narrow = self.teacher.hidden_size, self.student.hidden_size
        if wide == narrow:
            return None
        if self.channels is None:
            return torch.eye(wide, narrow)
        weight = torch.zeros(wide, narrow)
        weight[list(self.channels), range(narrow)] = 1.0
        return weight
