"""The section parallel: how a model is split over the ranks."""

from __future__ import annotations

from pydantic import Field, model_validator

from minitron_mp.config.base import Section


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

    @model_validator(mode="after")
    def _sensible(self) -> ParallelConfig:
        problems = []
        if self.vpp and self.pp == 1:
            problems.append(f"vpp {self.vpp} needs pp of at least 2, given 1; drop vpp or raise pp")
        if self.sequence_parallel and self.tp == 1:
            problems.append("sequence_parallel needs tp of at least 2, given 1; drop it or raise tp")
        if problems:
            raise ValueError("\n".join(problems))
        return self

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

        Chunk i is on pipeline stage i % pp. The first chunks take the remainder.
        """
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
