"""The section correct, and the settings that every training run has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from minitron_mp.config.base import IN_RESULT_IF_CHANGED, NOT_IN_RESULT, Section
from minitron_mp.config.paths import UserPath

FP8Scaling = Literal["tensorwise", "delayed", "blockwise"]
"""Scaling of FP8 numbers. tensorwise: by the largest value of the current tensor. delayed: by the
largest values of earlier steps; it is faster, but the loss falls slowly in the first steps.
blockwise: by the largest value of each block of 128 or 128 x 128; it is the most exact."""


class ProfileConfig(Section):
    """A trace of some steps of a training run, on some ranks."""

    steps: list[int] = Field(min_length=2, max_length=2)
    """[first, last] step, counted from 1 as in the log."""
    ranks: list[int] = Field(default=[0], min_length=1)
    """Ranks of the training run to trace. The ranks of a remote teacher cannot be traced."""
    kind: Literal["torch", "nsys"] = "torch"
    """torch: write a Chrome trace per rank to OUTPUT/profile. nsys: mark the steps for Nsight
    Systems. Start the job with nsys profile."""

    @model_validator(mode="after")
    def _in_order(self) -> ProfileConfig:
        if not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(
                f"steps {self.steps} must be [first, last], counted from 1; set two such numbers"
            )
        if min(self.ranks) < 0:
            raise ValueError(f"ranks {self.ranks} must not be negative; count ranks from 0")
        return self


class TrainingConfig(Section):
    """Settings of a training run: batches, optimizer, checkpoints."""

    steps: int = Field(default=100, ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(default=8, ge=1)
    """Samples per optimizer step, over all data parallel ranks."""
    micro_batch_size: int = Field(default=1, ge=1, json_schema_extra=NOT_IN_RESULT)
    """Samples per forward and backward pass of one data parallel rank."""
    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=1e-5, ge=0)
    """Learning rate at the last step. A constant schedule does not use it."""
    warmup_steps: int = Field(default=40, ge=0)
    """Steps of linear warm-up from 0 to `lr`."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine", json_schema_extra=IN_RESULT_IF_CHANGED
    )
    """Learning rate after warm-up. cosine, linear: it falls from `lr` to `min_lr` at the last step.
    constant: it stays `lr`. wsd (warm-up, stable, decay): it stays `lr` and falls to `min_lr` in
    the last `decay_steps` steps."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Number of last steps in which schedule wsd lowers the learning rate. It has no default."""
    decay_shape: Literal["minus_sqrt", "linear", "cosine", "exponential"] = Field(
        default="minus_sqrt", json_schema_extra=IN_RESULT_IF_CHANGED
    )
    """Decay of schedule wsd. The rate is min_lr + (lr - min_lr) f(x), with x from 0 to 1 over
    `decay_steps`. minus_sqrt: f = 1 - sqrt(x). linear: 1 - x. cosine: (1 + cos(pi x)) / 2.
    exponential: 2 / 2^x - 1."""
    skip_batches: list[list[int]] = Field(default=[], json_schema_extra=IN_RESULT_IF_CHANGED)
    """Ranges [first, last] of batches of the text that are left out, counted from 1. Step n reads
    batch n plus the batches skipped before it. The number of steps does not change."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Weight decay of AdamW."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm. 0 turns clipping off."""
    max_skipped: int = Field(default=10, ge=0, json_schema_extra=NOT_IN_RESULT)
    """Most steps in a row without an update. A step has no update if its gradient or loss is not
    finite. One more such step ends the run."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment of Adam."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment of Adam."""
    logits_precision: Literal["bf16", "fp32"] = "fp32"
    """Precision of the logits inside the loss. In a bf16 model bf16 logits add 2 to 5 % error to
    the gradient at 131072 columns."""
    gradient_precision: Literal["bf16", "fp32"] = Field(
        default="fp32", json_schema_extra=IN_RESULT_IF_CHANGED
    )
    """Precision in which gradients are added up, over microbatches and over data parallel ranks. bf16
    halves their memory and their transfer. It needs a bf16 model."""
    moment_precision: Literal["bf16", "fp32"] = Field(default="fp32", json_schema_extra=IN_RESULT_IF_CHANGED)
    """Precision of both moments of Adam. bf16 halves their memory; the optimizer's weights stay
    float32. It needs a bf16 model, a GPU, and the Adam of Transformer Engine 2.4 or later."""
    overlap: bool = Field(default=False, json_schema_extra=NOT_IN_RESULT)
    """Overlap gradient reduction and parameter gathering with computation."""
    recompute: bool | Annotated[int, Field(ge=1)] = Field(default=False, json_schema_extra=NOT_IN_RESULT)
    """Recompute activations in the backward pass. true: of each layer. A number: of so many first
    layers of each model chunk (pipeline stage, or its part with vpp)."""
    fp8: FP8Scaling | None = None
    """Compute the products of the linear layers in FP8. Weights, gradients and all remaining
    tensors keep their precision. It needs Transformer Engine, an Ada, Hopper or Blackwell GPU, and
    sizes that are multiples of 16 (docs/precision.md). Start with tensorwise."""
    tp_comm_overlap: bool = Field(default=False, json_schema_extra=NOT_IN_RESULT)
    """Overlap tensor parallel communication with matrix products, through buffers that the GPUs of
    one NVLink domain share. It needs Transformer Engine and parallel.sequence_parallel."""
    cuda_graphs: bool = Field(default=False, json_schema_extra=NOT_IN_RESULT)
    """Record the forward and backward pass of each layer in the first step and replay them. One
    launch per layer replaces about a hundred. This helps at short sequences, where the GPU waits
    for the host. It needs Transformer Engine and Megatron-Core 0.19."""
    collect_interval: int | None = Field(default=None, ge=1, json_schema_extra=NOT_IN_RESULT)
    """Steps between two garbage collections of Python. All ranks collect at the same step. Default:
    each rank collects when its counter is full, and the other ranks wait for it."""
    log_interval: int = Field(default=1, ge=1, json_schema_extra=NOT_IN_RESULT)
    """Steps between two lines of the log."""
    straggler_factor: float = Field(default=1.3, gt=1, json_schema_extra=NOT_IN_RESULT)
    """Log the slowest rank if its forward passes in a log interval take this many times the median
    of the ranks of its pipeline stage."""
    checkpoint_interval: int = Field(default=100, ge=1, json_schema_extra=NOT_IN_RESULT)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1, json_schema_extra=NOT_IN_RESULT)
    """Number of newest checkpoints to keep."""
    keep_every: int = Field(default=0, ge=0, json_schema_extra=NOT_IN_RESULT)
    """Also keep the checkpoint of every step that is a multiple of this, after the end of the run,
    too. 0: none."""
    valid_interval: int = Field(default=0, ge=0, json_schema_extra=NOT_IN_RESULT)
    """Steps between two validations on the held-out text of `data`. Of the validated checkpoints the
    one with the lowest held-out loss is kept. 0: no validation."""
    valid_batches: int = Field(default=4, ge=1, json_schema_extra=NOT_IN_RESULT)
    """Held-out batches of `global_batch_size` samples in a validation."""
    patience: int | None = Field(default=None, ge=1)
    """Validations in a row without a lower held-out loss that end the run early. Default: no early
    stop. The result is the model of the last step. --step best exports the best saved one."""
    async_save: bool = Field(default=False, json_schema_extra=NOT_IN_RESULT)
    """Continue training while a checkpoint is written. Meanwhile host memory holds a copy of the
    weights and the optimizer state."""
    profile: ProfileConfig | None = Field(default=None, json_schema_extra=NOT_IN_RESULT)
    """Trace of some steps. Default: no trace."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        problems = []
        if self.warmup_steps >= self.steps:
            problems.append(
                f"warmup_steps {self.warmup_steps} must be smaller than steps {self.steps}; lower it"
            )
        if self.min_lr > self.lr:
            problems.append(f"min_lr {self.min_lr} is above lr {self.lr}; lower min_lr or raise lr")
        problems += self._schedule_problems()
        if self.cuda_graphs and self.recompute:
            problems.append("cuda_graphs and recompute cannot be combined; drop one of them")
        if self.profile and self.profile.steps[1] > self.steps:
            problems.append(
                f"profile.steps {self.profile.steps} ends after the last step, {self.steps}; lower it"
            )
        problems += self._validation_problems() + self._problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def num_samples(self) -> int:
        """Samples of the run."""
        return self.steps * self.global_batch_size

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that change the result. An early stop depends on the validations."""
        names = {"valid_interval", "valid_batches"} if self.patience is not None else set()
        return super().result_settings() | self.model_dump(include=names)

    def _validation_problems(self) -> list[str]:
        problems = []
        interval, checkpoints = self.valid_interval, self.checkpoint_interval
        if self.keep_every % checkpoints:
            problems.append(
                f"keep_every {self.keep_every} must be a multiple of checkpoint_interval {checkpoints}; "
                "change one of them"
            )
        if self.patience is not None and not interval:
            problems.append("patience needs validations; set valid_interval, or drop patience")
        if interval and interval % checkpoints and checkpoints % interval:
            problems.append(
                f"valid_interval {interval} must divide checkpoint_interval {checkpoints} or be a multiple "
                "of it, so that there are validated checkpoints; change one of them"
            )
        if interval and self.fp8 == "delayed":
            problems.append(
                "valid_interval and fp8 delayed cannot be combined, because a validation would change the "
                "scales of the next step; set fp8: tensorwise, or drop valid_interval"
            )
        return problems

    def recomputed_share(self, chunks: Sequence[int]) -> float:
        """Return the share of the layers that are recomputed. chunks: layers of each model chunk."""
        if isinstance(self.recompute, bool):
            return float(self.recompute)
        return sum(min(self.recompute, num_layers) for num_layers in chunks) / sum(chunks)

    def _schedule_problems(self) -> list[str]:
        if self.schedule != "wsd":
            unused = self.changed(["decay_steps", "decay_shape"])
            return [
                f"{name}: no effect with schedule {self.schedule}; drop it, or set schedule: wsd"
                for name in unused
            ]
        if self.decay_steps is None:
            return ["schedule wsd needs decay_steps, the steps in which the learning rate falls; set it"]
        if self.warmup_steps + self.decay_steps > self.steps:
            return [
                f"warmup_steps {self.warmup_steps} and decay_steps {self.decay_steps} are more than steps "
                f"{self.steps}; lower one of them"
            ]
        return []

    @field_validator("skip_batches")
    @classmethod
    def _ascending(cls, ranges: list[list[int]]) -> list[list[int]]:
        ends = [end for pair in ranges for end in pair]
        if any(len(pair) != 2 for pair in ranges) or any(pair[0] > pair[1] for pair in ranges):
            raise ValueError(f"{ranges} must be ranges [first, last]; write [[first, last], ...]")
        if any(after <= before for (_, before), (after, _) in pairwise(ranges)) or min(ends, default=1) < 1:
            raise ValueError(
                f"{ranges} must be ascending ranges without overlap, counted from 1; sort or join them"
            )
        return ranges

    def _problems(self) -> list[str]:
        """Return further problems; a subclass overrides it."""
        return []


class CorrectionConfig(TrainingConfig):
    """Teacher correction: train the unpruned teacher on the distillation text by cross-entropy.

    The defaults follow 2408.11796, teacher correction: a fifth of the peak learning rate of the
    teacher's pre-training, 120 warm-up steps, cosine.
    """

    when: Literal["before", "during"] = "before"
    """before: correct the teacher first, then score and prune it and distil from it. during: prune
    the original teacher, and correct it while the student is distilled from it (2408.11796, figure
    5). In each step both are trained on the same batches, on the student's ranks."""
    steps: int = Field(default=1000, ge=1)
    """Optimizer steps. With `when: during` at most distill.steps. After the last of these steps the
    teacher is frozen."""
    lr: float = Field(default=6e-5, gt=0)
    """Peak learning rate. Use a fifth of the peak in the teacher's pre-training. 6e-5 is the value
    for Llama 3.1 8B, which was trained with 3e-4."""
    min_lr: float = Field(default=1e-6, ge=0)
    """Learning rate at the last step. A constant schedule does not use it."""
    warmup_steps: int = Field(default=120, ge=0)
    """Steps of linear warm-up from 0 to `lr`."""
    baseline: UserPath | None = Field(default=None, json_schema_extra=NOT_IN_RESULT)
    """Output folder of a run of the same recipe without this section. The report compares the two
    students."""
    divergence: ClassVar = "forward_kl"
    divergence_parameters: ClassVar = None
    temperature: ClassVar = 1.0
    kl_weight: ClassVar = 0.0
    ce_weight: ClassVar = 1.0
    states: ClassVar = None
