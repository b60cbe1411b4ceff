"""Sections of the recipe: what they are made of, the text, the layout, what is measured and what comes out."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Aggregation = Literal["mean", "l2", "var"]


def _with_suffix(value: Any) -> Any:
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    if isinstance(value, str) and value[-1:].upper() in units:
        try:
            return float(value[:-1]) * units[value[-1].upper()]
        except ValueError:
            raise ValueError(f"{value!r} is no number of parameters; write 8.4e9, 8.4B or 102M") from None
    return value


Count = Annotated[float, BeforeValidator(_with_suffix)]
Paths = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""A list, or one path by itself."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """Text for calibration, training and held-out evaluation."""

    source: str | list[str] = "python-stdlib"
    """Files or folders of .txt and .jsonl (field "text"), or Megatron .bin/.idx prefixes, shared out by document among the three parts
    (by pieces of documents where they are few); or "python-stdlib"."""
    calibration: Paths = []
    """Instead of source: .txt, .jsonl or Megatron .bin/.idx prefixes for each part, used as they are."""
    train: Paths = []
    valid: Paths = []
    valid_fraction: float = Field(0.03, gt=0, lt=0.5)
    """Share of the documents of source held out; as many again are for calibration."""
    sequence_length: int = Field(512, ge=2)
    """Tokens a sample."""
    tokenizer: str | None = None
    """Hugging Face tokenizer folder or sentencepiece .model file; default: the model's own."""
    held_out: dict[str, Paths] = {}
    """Name -> files or folders as above: further texts for `evaluate`, such as what the teacher was trained on: {pretraining: [old/]}."""

    @model_validator(mode="after")
    def _all_parts(self) -> Data:
        if taken := {"source", "python-stdlib", "calibration", "train", "valid"} & self.held_out.keys():
            raise ValueError(
                f"held_out: {', '.join(sorted(taken))} means something else here; take another name"
            )
        if odd := [name for name in self.held_out if not re.fullmatch(r"[A-Za-z0-9_.-]+", name)]:
            raise ValueError(
                f"held_out: {odd[0]!r} is to be part of a file's name; use letters, digits, _ . and -"
            )
        given = [name for name in ("calibration", "train", "valid") if getattr(self, name)]
        if given and len(given) < 3:
            missing = sorted({"calibration", "train", "valid"} - set(given))
            raise ValueError(
                f"{', '.join(given)} given without {', '.join(missing)}; give all three, or only source"
            )
        if given and (
            self.source != "python-stdlib"
            or self.valid_fraction != type(self).model_fields["valid_fraction"].default
        ):
            raise ValueError(
                "source and valid_fraction say how to make calibration, train and valid; with these three given, drop them"
            )
        return self


class Parallel(Section):
    """How the model is cut over the ranks; data parallel is what is left of the world."""

    tp: int = Field(1, ge=1)
    pp: int = Field(1, ge=1)
    cp: int = Field(1, ge=1)
    vpp: int | None = Field(None, ge=2)
    """Model chunks a pipeline stage (interleaved schedule)."""
    sequence_parallel: bool = False

    @model_validator(mode="after")
    def _sensible(self) -> Parallel:
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


class Score(Section):
    """Importance by forward passes over calibration text."""

    num_samples: int = Field(1024, ge=1)
    micro_batch_size: int = Field(1, ge=1)
    batch_aggregation: Aggregation = "l2"
    sequence_aggregation: Aggregation = "mean"


class Evaluate(Section):
    """Loss and perplexity on held-out text, and the KL to the teacher."""

    num_samples: int = Field(64, ge=1)
    micro_batch_size: int = Field(1, ge=1)
    tasks: dict[str, str] = {}
    """Name -> .jsonl of items, choices or last words (docs/evaluation.md says in what form): {piqa: tasks/piqa.jsonl}."""
    task_items: int | None = Field(None, ge=1)
    """The first so many of each file; default: all."""


class Export(Section):
    """The Hugging Face folder at the end."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "nemotron"] | None = None
    """Write the student as another family; only llama -> mistral, which computes the same, is possible."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Default: the precision of the run."""
