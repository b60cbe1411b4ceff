"""The section parallel: how a model is split over the ranks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from pydantic import Field, model_validator

from minitron_mp.config.base import Section

LayerCounts = tuple[Annotated[int, Field(ge=1)], ...]
"""Number of layers of each model chunk, in order of depth. A tuple, because layouts are hashed."""


class ParallelConfig(Section):
    """How a model is split over the ranks.

    Data parallelism uses the remaining factor of the world size.
    """

    tp: int = Field(default=1, ge=1)
    """Tensor parallel size."""
    pp: int = Field(default=1, ge=1)
    """Pipeline parallel size."""
    cp: int = Field(default=1, ge=1)
    """Context parallel size: ranks that share one sequence."""
    vpp: int | None = Field(default=None, ge=2)
    """Virtual pipeline size: model chunks per pipeline stage, for the interleaved schedule."""
    sequence_parallel: bool = False
    """Split the activations outside the tensor parallel regions over the tp ranks. It needs tp of
    at least 2."""
    layers: LayerCounts | None = None
    """Layers of each pipeline stage of the student, such as [21, 19]. With vpp: of each model chunk,
    in order of depth (chunk i is on stage i % pp). The list holds for every model with that number of
    layers. Default: the first stages have one layer more if the layers do not divide."""
    teacher_layers: LayerCounts | None = None
    """The same for the unpruned model and the teacher, if the student has fewer layers."""

    @model_validator(mode="after")
    def _sensible(self) -> ParallelConfig:
        problems = []
        if self.vpp and self.pp == 1:
            problems.append(f"vpp {self.vpp} needs pp of at least 2, given 1; drop vpp or raise pp")
        if self.sequence_parallel and self.tp == 1:
            problems.append("sequence_parallel needs tp of at least 2, given 1; drop it or raise tp")
        problems += self._list_problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _list_problems(self) -> list[str]:
        """Return the problems of `layers` and `teacher_layers` that need no model."""
        lists = {"layers": self.layers, "teacher_layers": self.teacher_layers}
        chunks = self.pp * (self.vpp or 1)
        what = "model chunks (pp x vpp)" if self.vpp else "pipeline stages (pp)"
        problems = [
            f"{name} {list(counts)} has {len(counts)} numbers for {chunks} {what}; give one for each"
            for name, counts in lists.items()
            if counts is not None and len(counts) != chunks
        ]
        if self.layers and self.teacher_layers and sum(self.layers) == sum(self.teacher_layers):
            problems.append(
                f"teacher_layers has as many layers as layers, {sum(self.layers)}, and a list holds for "
                "every model with that number; drop teacher_layers"
            )
        return problems

    def depth_problems(
        self, students: Collection[int], teachers: Collection[int], section: str = "parallel"
    ) -> list[str]:
        """Return the problems of `layers` and `teacher_layers` with the models of a recipe.

        students, teachers: numbers of layers of the models that each list may be for. section: name
        of this section in error messages.
        """
        lists = (
            ("layers", self.layers, students, "the student has"),
            ("teacher_layers", self.teacher_layers, teachers, "the unpruned model and the teacher have"),
        )
        problems = []
        for name, counts, depths, who in lists:
            if counts is None or sum(counts) in depths:
                continue
            numbers = " or ".join(map(str, sorted(set(depths))))
            even = list(ParallelConfig(pp=self.pp, vpp=self.vpp).layers_of_chunks(max(depths)))
            problems.append(
                f"{section}.{name} {list(counts)} is {sum(counts)} layers, {who} {numbers}; give numbers "
                f"with that sum, such as {even}, or drop it"
            )
        return problems

    @property
    def interleaved(self) -> int:
        """Divisor that the microbatches of a step must have: pp with vpp, else 1."""
        return self.pp if self.vpp else 1

    @property
    def sequence_multiple(self) -> int:
        """Divisor that a sequence length must have.

        It is 2 cp with context parallelism (else 1), times tp with sequence parallelism.
        """
        context_parts = 2 * self.cp if self.cp > 1 else 1
        return context_parts * self.tp if self.sequence_parallel else context_parts

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp

    def layers_of_chunks(self, num_layers: int) -> list[int]:
        """Return the number of layers of each model chunk, in order of depth.

        Chunk i is on pipeline stage i % pp. A model without a list in `layers` or `teacher_layers` is
        split evenly. The first chunks take the remainder.
        """
        for counts in (self.layers, self.teacher_layers):
            if counts is not None and sum(counts) == num_layers:
                return list(counts)
        chunks = self.pp * (self.vpp or 1)
        smallest, remainder = divmod(num_layers, chunks)
        return [smallest + 1 if i < remainder else smallest for i in range(chunks)]

    def place_of_state(self, state: int, num_layers: int) -> tuple[int, int]:
        """Return (pipeline stage, number of the chunk on it) that computes a hidden state.

        state: number of a layer, whose input it is; num_layers for the output of the final norm.
        """
        chunks = self.layers_of_chunks(num_layers)
        last = 0
        for number, count in enumerate(chunks):
            last += count
            if state < last or number + 1 == len(chunks):
                break
        return number % self.pp, number // self.pp

    def tokens_of_sample(self, sequence_length: int) -> int:
        """Return the tokens of one sample that a rank holds between its layers."""
        return sequence_length // self.cp // (self.tp if self.sequence_parallel else 1)
