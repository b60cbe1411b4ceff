"""The sections score, target, depth and search: measurements, and the sizes of the student."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from minitron_mp.config.base import NOT_IN_RESULT, Count, Section
from minitron_mp.config.paths import UserPath

SequenceAggregation = Literal["mean", "l2", "var"]
BatchAggregation = Literal["mean", "l2", "var"]

BUDGETS = ("parameters", "memory_gib", "latency_ms")

DEPTH = "layer"
"""Name of depth in target.axes. The names of widths are in models/axes.py."""


class ScoreConfig(Section):
    """Importance scores, computed by forward passes over calibration text."""

    num_samples: int = Field(default=1024, ge=1)
    """Calibration samples."""
    micro_batch_size: int = Field(default=1, ge=1, json_schema_extra=NOT_IN_RESULT)
    """Samples per forward pass of one data parallel rank."""
    batch_aggregation: BatchAggregation = "l2"
    """Second step: combines the values of all samples into one score."""
    sequence_aggregation: SequenceAggregation = "mean"
    """First step: combines the activations at all positions of a sample into one value."""


class TargetConfig(Section):
    """Sizes of the student: given one by one, as a number of parameters, or as a fraction."""

    num_layers: int | None = Field(default=None, ge=1)
    """Layers of the student. The section `depth` sets which layers are dropped."""
    drop_layers: list[int] | None = None
    """Layers to drop, counted from 0. Replaces num_layers."""
    hidden_size: int | None = Field(default=None, ge=1)
    """Hidden size of the student."""
    ffn_hidden_size: int | None = Field(default=None, ge=1)
    """Width of the student's MLPs."""
    num_attention_heads: int | None = Field(default=None, ge=1)
    """Query heads of the student. Each query group has the same number. Default: the teacher's
    number per group."""
    num_query_groups: int | None = Field(default=None, ge=1)
    """Query groups (key and value heads) of the student. A dropped group loses all its query heads.
    tp must divide the number. The papers keep all groups."""
    merge_heads: bool = False
    """Add the residual of a pruned head to the query of a kept head of its group: head + (head -
    pruned) (2407.14679, section 2.3)."""
    max_parameters: Count | None = Field(default=None, gt=0)
    """Largest number of parameters of the student: 8.4e9, "8.4B" or "102M"."""
    keep: float | None = Field(default=None, gt=0, le=1)
    """Largest fraction of the teacher's parameters."""
    axes: list[str] | None = Field(default=None, min_length=1)
    """Axes that max_parameters and keep may reduce: hidden, ffn, or both by the same factor; or
    layer alone. Default: hidden and ffn."""
    align: int = Field(default=16, ge=1)
    """Divisor of hidden_size and of each rank's part of ffn_hidden_size: 16 for FP8, 32 for
    MXFP8."""
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
        has_sizes = any(getattr(self, name) for name in self._sizes)
        if self.num_layers and self.drop_layers is not None:
            raise ValueError("num_layers and drop_layers exclude each other; give one of them")
        if self.drop_layers is not None and self.drop_layers != sorted(
            {layer for layer in self.drop_layers if layer >= 0}
        ):
            raise ValueError(
                f"drop_layers {self.drop_layers} must be ascending from 0, without repeats; sort the list"
            )
        if [has_sizes, self.max_parameters is not None, self.keep is not None].count(True) > 1:
            raise ValueError("sizes, max_parameters and keep exclude each other; give one of them")
        if self.axes is not None and not self.searched:
            raise ValueError(
                f"axes {self.axes} has no effect without max_parameters or keep; drop axes, or give one "
                "of them in place of sizes"
            )
        return self

    @property
    def searched(self) -> bool:
        """Whether the sizes are computed from max_parameters or keep."""
        return self.max_parameters is not None or self.keep is not None

    @property
    def given(self) -> bool:
        """Whether the section sets any size or budget."""
        return self.searched or any(getattr(self, name) for name in self._sizes)


class DepthConfig(Section):
    """Choice of the layers that are dropped when the student has fewer layers.

    The stage `depth` measures all methods except cosine. With metric task the accuracy on a task
    replaces the loss, as 2408.11796 does with Winogrande.
    """

    method: Literal["cosine", "drop", "block", "greedy"] = "cosine"
    """cosine: drop the layers that change the hidden states least (the stage `score` measures it).
    drop: measure the loss without each single layer, and drop the layers with the smallest loss
    (2407.14679, depth). block: measure the loss without each contiguous block, and drop the block
    with the smallest loss (2408.11796, depth). greedy: drop one layer at a time, and measure again
    after each."""
    protect_first: int = Field(default=0, ge=0)
    """Layers at the start that are always kept."""
    protect_last: int = Field(default=0, ge=0)
    """Layers at the end that are always kept."""
    metric: Literal["loss", "task"] = "loss"
    """loss: cross-entropy on calibration text. task: accuracy by partial scoring. When accuracies
    are equal, the higher likelihood of the correct options decides."""
    num_samples: int = Field(default=32, ge=1)
    """Calibration samples, for metric loss."""
    task: UserPath | None = None
    """File of items (.jsonl), for metric task. It has the format of evaluate.tasks."""
    task_items: int | None = Field(default=None, ge=1)
    """Use only the first items of the task. Default: all."""
    micro_batch_size: int = Field(default=1, ge=1, json_schema_extra=NOT_IN_RESULT)
    """Samples, or options of a task, per forward pass."""

    @model_validator(mode="after")
    def _one_metric(self) -> DepthConfig:
        problems = []
        if self.metric == "task" and self.task is None:
            problems.append("metric task needs a file of items; give task: FILE.jsonl")
        if self.metric == "task" and self.method == "cosine":
            problems.append(
                "metric task: no effect with method cosine; set method: drop, block or greedy, or drop metric"
            )
        ignored = self.changed(["num_samples"] if self.metric == "task" else ["task", "task_items"])
        if ignored:
            problems.append(f"{', '.join(ignored)}: no effect with metric {self.metric}; drop it")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class SearchConfig(Section):
    """Search of the sizes of the student. It replaces the sizes in `target`.

    All candidates inside a budget are ranked by their loss after pruning. Pruning is done with
    masks, so no weight is copied. The best candidates are distilled for a short time. The better
    half of them is distilled for longer, and so on, until one candidate is left (2407.14679:
    candidates within 5 % of the parameters, ranked after light retraining). Candidates are ranked
    on the calibration part, so the held-out part is never used for model selection.

    Give one budget (parameters, memory_gib or latency_ms), and a list for each size that may vary.
    """

    parameters: Count | None = Field(default=None, gt=0)
    """Number of parameters, with the relative `tolerance`: 8e9 or "8B"."""
    memory_gib: float | None = Field(default=None, gt=0)
    """Largest memory in GiB for the weights and the key-value cache of `batch_size` sequences of
    `context` tokens, over all ranks."""
    latency_ms: float | None = Field(default=None, gt=0)
    """Longest forward pass in milliseconds over `batch_size` sequences of `context` tokens,
    measured on the ranks of the job."""
    tolerance: float = Field(default=0.05, gt=0, lt=0.5)
    """For parameters, the largest relative difference from the budget. For memory_gib and
    latency_ms, candidates use at least 1 - 2 tolerance of the budget."""
    batch_size: int = Field(default=1, ge=1)
    """Number of sequences, for memory_gib and latency_ms."""
    context: int | None = Field(default=None, ge=1)
    """Tokens per sequence, for memory_gib and latency_ms. Default: data.sequence_length."""
    num_layers: list[int] = []
    """Numbers of layers to try. Default: from the teacher's number down to nine tenths of it."""
    hidden_size: list[int] = []
    """Hidden sizes to try. Default: multiples of a sixteenth of the teacher's hidden size, down to
    half of it."""
    ffn_hidden_size: list[int] = []
    """MLP widths to try. Default: the width that is nearest to the budget."""
    mlp_expansion: list[float] = []
    """MLP widths to try, as factors of the hidden size, rounded to the nearest aligned width.
    Replaces ffn_hidden_size."""
    num_query_groups: list[int] = []
    """Numbers of query groups to try. Default: the teacher's."""
    num_attention_heads: list[int] = []
    """Numbers of query heads to try. Default: the teacher's number per query group."""
    num_samples: int = Field(default=64, ge=1)
    """Calibration samples on which candidates are ranked."""
    micro_batch_size: int = Field(default=1, ge=1, json_schema_extra=NOT_IN_RESULT)
    """Samples per forward pass of the ranking."""
    finalists: int = Field(default=4, ge=1)
    """Number of candidates that are distilled. With 1 the best pruned candidate is chosen without
    distillation."""
    steps: int = Field(default=100, ge=2)
    """Optimizer steps of the last two candidates. Candidates that are dropped one round earlier get
    half as many steps, and so on. Learning rate and batches are those of `distill`."""
    together: int | None = Field(default=None, ge=1, json_schema_extra=NOT_IN_RESULT)
    """Number of students in memory at the same time. They share each forward pass of the teacher.
    Default: all remaining candidates."""
    max_candidates: int = Field(default=256, ge=1, json_schema_extra=NOT_IN_RESULT)
    """Largest number of candidates. A larger number is an error."""

    @model_validator(mode="after")
    def _one_budget(self) -> SearchConfig:
        problems = []
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            problems.append(
                "give one budget of parameters, memory_gib and latency_ms, given "
                f"{' and '.join(given) or 'none'}"
            )
        if given == ["parameters"] and self.changed(["context", "batch_size"]):
            problems.append("batch_size and context are for memory_gib and latency_ms; drop them")
        if self.ffn_hidden_size and self.mlp_expansion:
            problems.append("ffn_hidden_size and mlp_expansion exclude each other; drop one of them")
        if given == ["latency_ms"] and not (self.ffn_hidden_size or self.mlp_expansion):
            problems.append(
                "latency_ms cannot be solved for ffn_hidden_size; list the widths to try in "
                "ffn_hidden_size or mlp_expansion"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def budget(self) -> tuple[str, float]:
        """Name and value of the budget."""
        values = ((name, getattr(self, name)) for name in BUDGETS)
        return next((name, value) for name, value in values if value is not None)

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest part of the budget that a candidate may use."""
        name, value = self.budget
        if name == "parameters":
            return value * (1 - self.tolerance), value * (1 + self.tolerance)
        return value * (1 - 2 * self.tolerance), value

    def rounds(self, students: int) -> list[int]:
        """Return the step at which each round of distillation ends.

        Each round halves the number of students.
        """
        count = math.ceil(math.log2(students))
        return [max(1, self.steps >> (count - 1 - i)) for i in range(count)]
