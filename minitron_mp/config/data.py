"""The sections data, evaluate and export: the text, the measurements, and the written model."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from minitron_mp.config.base import NOT_IN_RESULT, Section
from minitron_mp.config.blend import Share, UserTexts, shares_of
from minitron_mp.config.paths import UserPath, UserPathOrPaths, UserPaths

PARTS = ("calibration", "train", "valid")


class DataConfig(Section):
    """Text for calibration, training and held-out evaluation."""

    source: UserPathOrPaths = "python-stdlib"
    """Files or folders of .txt, .jsonl, .json and .parquet (docs/text.md), or Megatron .bin/.idx
    prefixes. Their documents are split into the three parts. If the source has few documents,
    pieces of documents are split instead. The default is the source code of Python's standard
    library."""
    calibration: UserTexts = []
    """Text for calibration, as for `source`. It is not split. `calibration`, `train` and `valid`
    together replace `source`."""
    train: UserTexts = []
    """Text for training. It is not split. A map from texts to shares is a blend (docs/text.md):
    {web/: 3, code: 1, math: 2 epochs, wiki: 5B tokens}. Epochs and tokens are those of the run of
    distill. A list is mixed in proportion to size."""
    valid: UserTexts = []
    """Held-out text. It is not split."""
    text_field: str = Field(default="text", min_length=1)
    """Field of the text in the records of .jsonl, .json and .parquet. a.b is the field b of the
    object a."""
    chat_field: str | None = Field(default=None, min_length=1)
    """Field of a list of messages in the records, for example messages. A record with this field is a
    chat: the chat template makes its text, and only the tokens of the assistant count in the loss
    (docs/text.md). Other records have their text in `text_field`. Default: no record is a chat."""
    chat_template: UserPath | None = None
    """File with the Jinja template of the chats. The assistant's text must be between {% generation %}
    and {% endgeneration %} in it. Default: the template of the tokenizer."""
    valid_fraction: float = Field(default=0.03, gt=0, lt=0.5)
    """Fraction of the documents of `source` in the held-out part. The calibration part has the same
    size."""
    valid_tokens: int | None = Field(default=None, ge=1)
    """Tokens in the held-out part, and as many in the calibration part. `valid_fraction` must give at
    least this many; the other documents go to the training part. Default: no limit."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens per sample."""
    eod_mask_loss: bool = False
    """Leave the token after the end of a document out of all losses: the model cannot predict how the
    next document begins."""
    document_mask: bool = False
    """Tokens attend only to tokens of the same document. It needs `transformer_impl: local`."""
    tokenizer: UserPath | None = None
    """Hugging Face tokenizer folder or sentencepiece .model file. Default: the tokenizer of the
    model."""
    workers: int | None = Field(default=None, ge=1, json_schema_extra=NOT_IN_RESULT)
    """Processes that tokenize a text of more than 256 MiB. Default: one for each CPU of the process,
    but at most one for each shard. The result does not depend on it."""
    held_out: dict[str, UserPaths] = {}
    """Further texts for `evaluate`: name -> files or folders, as for `source`. Example:
    {pretraining: [old/]}."""

    def shares(self, part: str) -> tuple[Share, ...] | None:
        """Return the shares of the texts of a part, or None if it is not a blend."""
        return shares_of(getattr(self, part)) if part in PARTS else None

    @model_validator(mode="after")
    def _all_parts(self) -> DataConfig:
        reserved = {"source", "python-stdlib", *PARTS} & self.held_out.keys()
        if reserved:
            raise ValueError(
                f"held_out: the name {', '.join(sorted(reserved))} is reserved; use a different name"
            )
        for name in self.held_out:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise ValueError(
                    f"held_out: the name {name!r} becomes a file name; use letters, digits, _ . and -"
                )
        if self.chat_template is not None and self.chat_field is None:
            raise ValueError("chat_template needs chat_field; set chat_field, for example to messages")
        given = [name for name in PARTS if getattr(self, name)]
        missing = sorted(set(PARTS) - set(given))
        if given and missing:
            raise ValueError(
                f"{', '.join(given)} given without {', '.join(missing)}; give all three, or only source"
            )
        for part in ("calibration", "valid"):
            if any(share.unit != "weight" for share in self.shares(part) or ()):
                raise ValueError(
                    f"{part} has a share in epochs or tokens, which only train may have; give weights"
                )
        if given and self.changed(["source", "valid_fraction", "valid_tokens"]):
            raise ValueError(
                "calibration, train and valid replace source, valid_fraction and valid_tokens, and both "
                "kinds are given; drop one kind"
            )
        return self


class EvaluateConfig(Section):
    """Loss, perplexity and KL to the teacher on held-out text, and accuracy in tasks."""

    num_samples: int = Field(default=64, ge=1)
    """Samples of held-out text."""
    micro_batch_size: int = Field(default=1, ge=1, json_schema_extra=NOT_IN_RESULT)
    """Samples, or options of a task, per forward pass."""
    tasks: dict[str, UserPath] = {}
    """Name -> .jsonl file of multiple-choice or last-word items. docs/evaluation.md describes the
    format. Example: {piqa: tasks/piqa.jsonl}."""
    task_items: int | None = Field(default=None, ge=1)
    """Use only the first items of each task. Default: all."""


class ExportConfig(Section):
    """The Hugging Face folder of the student."""

    # A name of models/families. This package cannot import models, so preflight checks the name.
    family: str | None = None
    """Family of the written student, if it differs from the family of the model. Both must compute
    the same function. Possible: llama -> mistral. Default: the family of the model."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Number format of the weights. Default: `precision`."""
