"""Sections of the recipe: what they are made of, the text, the layout, what is measured and what comes out."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from minitron_mp.config.base import Paths, Section


class DataConfig(Section):
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
    def _all_parts(self) -> DataConfig:
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


class EvaluateConfig(Section):
    """Loss and perplexity on held-out text, and the KL to the teacher."""

    num_samples: int = Field(64, ge=1)
    micro_batch_size: int = Field(1, ge=1)
    tasks: dict[str, str] = {}
    """Name -> .jsonl of items, choices or last words (docs/evaluation.md says in what form): {piqa: tasks/piqa.jsonl}."""
    task_items: int | None = Field(None, ge=1)
    """The first so many of each file; default: all."""


class ExportConfig(Section):
    """The Hugging Face folder at the end."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "nemotron"] | None = None
    """Write the student as another family; only llama -> mistral, which computes the same, is possible."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Default: the precision of the run."""
