"""Sections of the recipe that say what the student is: sizes or a budget, layers, search."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from minitron_mp.config.base import Count, Section

Aggregation = Literal["mean", "l2", "var"]


class ScoreConfig(Section):
    """Importance by forward passes over calibration text."""

    num_samples: int = Field(1024, ge=1)
    micro_batch_size: int = Field(1, ge=1)
    batch_aggregation: Aggregation = "l2"
    sequence_aggregation: Aggregation = "mean"


class TargetConfig(Section):
    """What the student should be: explicit sizes, or a number of parameters, or a share of the teacher's."""

    num_layers: int | None = Field(None, ge=1)
    drop_layers: list[int] | None = None
    """Instead of num_layers: the very layers that go, from 0."""
    hidden_size: int | None = Field(None, ge=1)
    ffn_hidden_size: int | None = Field(None, ge=1)
    num_attention_heads: int | None = Field(None, ge=1)
    """Query heads, as many in each query group; default: as many a group as the teacher has."""
    num_query_groups: int | None = Field(None, ge=1)
    """Key and value heads: fewer than the teacher's, and whole groups go with their query heads. tp must divide it. The papers keep all."""
    merge_heads: bool = False
    """Give the query of a kept head the residual of a pruned one of its group, head + (head - pruned) (2407.14679 section 2.3)."""
    max_parameters: Count | None = Field(None, gt=0)
    """At most so many parameters: 8.4e9, "8.4B" or "102M"."""
    keep: float | None = Field(None, gt=0, le=1)
    """At most this share of the teacher's parameters."""
    axes: list[Literal["hidden", "ffn", "layer"]] = Field(["hidden", "ffn"], min_length=1)
    """What max_parameters and keep may cut: width (hidden and ffn, scaled alike) or depth (layer)."""
    align: int = Field(16, ge=1)
    """hidden_size and each rank's part of ffn_hidden_size are multiples of this: 16 for FP8, 32 for MXFP8."""
    _sizes: ClassVar = (
        "num_layers",
        "drop_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> TargetConfig:
        sizes = [getattr(self, name) for name in self._sizes if getattr(self, name)]
        if self.num_layers and self.drop_layers is not None:
            raise ValueError("num_layers and drop_layers both say how deep the student is; give one of them")
        if self.drop_layers is not None and self.drop_layers != sorted(
            {n for n in self.drop_layers if n >= 0}
        ):
            raise ValueError(f"drop_layers {self.drop_layers} is not ascending from 0, each layer once")
        kinds = bool(sizes) + (self.max_parameters is not None) + (self.keep is not None)
        if kinds > 1:
            raise ValueError(
                "sizes, max_parameters and keep are three ways to say one thing; give one of them"
            )
        if sizes and self.axes != ["hidden", "ffn"]:
            raise ValueError(
                "axes says what max_parameters and keep may cut; with sizes there is nothing to choose: drop it"
            )
        return self

    @property
    def searched(self) -> bool:
        """Whether the sizes are to be found, not given."""
        return self.max_parameters is not None or self.keep is not None

    @property
    def given(self) -> bool:
        return self.searched or any(getattr(self, name) for name in self._sizes)


class DepthConfig(Section):
    """Which layers go, when the target has fewer.

    cosine: those that change the hidden states least (importance of the stage `score`). drop: those without which, one at a time, the
    loss is least (2407.14679, depth). block: the contiguous block without which the loss is least (2408.11796, depth).
    greedy: one after the other, each time the one without which the loss is least. All but cosine are measured by the stage `depth`.
    With metric task they are ranked by the accuracy that is left on a task, as 2408.11796 does with Winogrande, in place of the loss.
    """

    method: Literal["cosine", "drop", "block", "greedy"] = "cosine"
    protect_first: int = Field(0, ge=0)
    """So many layers at the start stay, whatever their score."""
    protect_last: int = Field(0, ge=0)
    metric: Literal["loss", "task"] = "loss"
    """loss: cross-entropy on calibration text. task: accuracy by partial scoring; of equals the one that finds the right options likelier."""
    num_samples: int = Field(32, ge=1)
    """Calibration samples for the losses."""
    task: str | None = None
    """For metric task: .jsonl of items, as in evaluate.tasks."""
    task_items: int | None = Field(None, ge=1)
    """The first so many of them; default: all."""
    micro_batch_size: int = Field(1, ge=1)
    """Samples, or options of a task."""

    @model_validator(mode="after")
    def _one_metric(self) -> DepthConfig:
        problems = []
        if self.metric == "task" and self.task is None:
            problems.append("metric task needs items to be right on; give task: FILE.jsonl")
        if self.metric == "task" and self.method == "cosine":
            problems.append(
                "metric task: without effect with method cosine, which measures nothing; set method: drop, block or greedy, or drop metric"
            )
        own = ["num_samples"] if self.metric == "task" else ["task", "task_items"]
        if ignored := [name for name in own if getattr(self, name) != type(self).model_fields[name].default]:
            problems.append(f"{', '.join(ignored)}: without effect with metric {self.metric}; drop it")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class SearchConfig(Section):
    """The student's sizes by search instead of by `target`: all candidates inside a budget are ranked by their held-out loss after pruning
    (by masks, no weight is copied); the best ones are distilled for a short time, the better half of them for longer, until one is left
    (2407.14679: candidates within 5 % of the parameters, ranked after light retraining). Held-out is the calibration text, so that what
    `evaluate` reads has chosen nothing.

    One budget: parameters, memory_gib or latency_ms. One list for each size; an empty one stands for num_layers: all of the teacher's to 9
    tenths of them; hidden_size: sixteenths of the teacher's, down to half; ffn_hidden_size: what comes nearest to the budget; num_query_groups:
    the teacher's; num_attention_heads: as many a group as the teacher has.
    """

    parameters: Count | None = Field(None, gt=0)
    """So many parameters, within `tolerance`: 8e9, "8B"."""
    memory_gib: float | None = Field(None, gt=0)
    """At most so much for weights and key-value cache of batch_size sequences of `context` tokens, over all ranks."""
    latency_ms: float | None = Field(None, gt=0)
    """At most so long for a forward pass of batch_size sequences of `context` tokens, measured on this job's ranks."""
    tolerance: float = Field(0.05, gt=0, lt=0.5)
    """parameters: either way. memory_gib, latency_ms: candidates use at least 1 - 2 tolerance of the budget."""
    batch_size: int = Field(1, ge=1)
    context: int | None = Field(None, ge=1)
    """Default: data.sequence_length."""
    num_layers: list[int] = []
    hidden_size: list[int] = []
    ffn_hidden_size: list[int] = []
    mlp_expansion: list[float] = []
    """Instead of ffn_hidden_size: times each hidden_size, to the nearest aligned one."""
    num_query_groups: list[int] = []
    num_attention_heads: list[int] = []
    num_samples: int = Field(64, ge=1)
    """Samples of held-out text that candidates are judged on."""
    micro_batch_size: int = Field(1, ge=1)
    """Of these samples."""
    finalists: int = Field(4, ge=1)
    """So many are distilled; 1: none, the best one as cut is chosen."""
    steps: int = Field(100, ge=2)
    """Optimizer steps of the last two; of those that leave a round earlier half as many, and so on. Learning rate and batches are those of `distill`."""
    together: int | None = Field(None, ge=1)
    """Students in memory at a time, which share each forward pass of the teacher; default: all that are left."""
    max_candidates: int = Field(256, ge=1)
    """More are refused: narrow the lists."""

    @model_validator(mode="after")
    def _one_budget(self) -> SearchConfig:
        given = [
            name for name in ("parameters", "memory_gib", "latency_ms") if getattr(self, name) is not None
        ]
        problems = (
            []
            if len(given) == 1
            else [
                f"give one budget of parameters, memory_gib and latency_ms, given {' and '.join(given) or 'none'}"
            ]
        )
        if given == ["parameters"] and (self.context is not None or self.batch_size != 1):
            problems.append(
                "batch_size and context are those of memory_gib and latency_ms; with parameters drop them"
            )
        if self.ffn_hidden_size and self.mlp_expansion:
            problems.append(
                "ffn_hidden_size and mlp_expansion both list the width of the MLP; drop one of them"
            )
        if given == ["latency_ms"] and not (self.ffn_hidden_size or self.mlp_expansion):
            problems.append(
                "latency_ms is measured for every candidate, so ffn_hidden_size cannot be solved for it: list the sizes to try"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def budget(self) -> tuple[str, float]:
        """(name, value) of the budget."""
        return next(
            (name, value)
            for name in ("parameters", "memory_gib", "latency_ms")
            if (value := getattr(self, name)) is not None
        )

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and most of the budget that a candidate may use."""
        name, value = self.budget
        return (
            (value * (1 - self.tolerance), value * (1 + self.tolerance))
            if name == "parameters"
            else (value * (1 - 2 * self.tolerance), value)
        )

    def rounds(self, students: int) -> list[int]:
        """Step at which each round of distillation of so many students ends; half of them stay after it, one after the last."""
        count = math.ceil(math.log2(students))
        return [max(1, self.steps >> (count - 1 - i)) for i in range(count)]
