"""Sections of the recipe: what they are made of, the text, the layout, what is measured and what comes out."""

from __future__ import annotations

from pydantic import Field, model_validator

from minitron_mp.config.base import Section


class ParallelConfig(Section):
    """How the model is cut over the ranks; data parallel is what is left of the world."""

    tp: int = Field(1, ge=1)
    pp: int = Field(1, ge=1)
    cp: int = Field(1, ge=1)
    vpp: int | None = Field(None, ge=2)
    """Model chunks a pipeline stage (interleaved schedule)."""
    sequence_parallel: bool = False

    @model_validator(mode="after")
    def _sensible(self) -> ParallelConfig:
        problems = []
        if self.vpp and self.pp == 1:
            problems.append(f"vpp {self.vpp} needs pp of at least 2, given 1: drop vpp or raise pp")
        if self.sequence_parallel and self.tp == 1:
            problems.append(
                "sequence_parallel splits activations over tensor parallel ranks, with tp 1 there is nothing to split: drop it or raise tp"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def interleaved(self) -> int:
        """What the interleaved schedule wants microbatches a step to be a multiple of; 1 without vpp."""
        return self.pp if self.vpp else 1

    def layers_of_chunks(self, num_layers: int) -> list[int]:
        """Layers of each model chunk in order of depth (chunk i is on stage i % pp); earlier ones take what does not divide."""
        chunks = self.pp * (self.vpp or 1)
        return [num_layers // chunks + (i < num_layers % chunks) for i in range(chunks)]

    def place_of_state(self, state: int, num_layers: int) -> tuple[int, int]:
        """(pipeline stage, model chunk there) that has layer `state`; num_layers: the final norm."""
        chunks, last = self.layers_of_chunks(num_layers), 0
        for number, count in enumerate(chunks):
            last += count
            if state < last or number + 1 == len(chunks):
                break
        return number % self.pp, number // self.pp

    def tokens_of_sample(self, sequence_length: int) -> int:
        """Tokens of one sample that a rank has between its layers."""
        return sequence_length // self.cp // (self.tp if self.sequence_parallel else 1)

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp
