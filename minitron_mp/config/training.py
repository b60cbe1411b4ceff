"""Sections of the recipe that train: correction, distillation, and the teacher beside it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from minitron_mp.config.base import Section

FP8Scaling = Literal["tensorwise", "delayed", "blockwise"]
"""How FP8 numbers are scaled. tensorwise: by the largest value of the tensor at hand; delayed: by those of earlier steps, faster, and slow to
start; blockwise: by that of each block of 128 or 128 x 128, the most exact."""


class ProfileConfig(Section):
    """A trace of some steps of a training run, on some ranks."""

    steps: list[int] = Field(min_length=2, max_length=2)
    """[first, last], from 1, as they are logged."""
    ranks: list[int] = Field([0], min_length=1)
    """Of the run; a remote teacher's are not among them."""
    kind: Literal["torch", "nsys"] = "torch"
    """torch: a Chrome trace for each rank in OUTPUT/profile. nsys: tells Nsight Systems, which has to start the job, when to trace."""

    @model_validator(mode="after")
    def _in_order(self) -> ProfileConfig:
        if not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(f"steps {self.steps} is no [first, last], counted from 1")
        if min(self.ranks) < 0:
            raise ValueError(f"ranks {self.ranks}: ranks count from 0")
        return self


class TrainingConfig(Section):
    """A training run: batches, optimizer, checkpoints."""

    steps: int = Field(100, ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(8, ge=1)
    """Samples an optimizer step, over all data parallel ranks."""
    micro_batch_size: int = Field(1, ge=1)
    lr: float = Field(1e-4, gt=0)
    min_lr: float = Field(1e-5, ge=0)
    warmup_steps: int = Field(40, ge=0)
    """Linear warm-up, then cosine from lr to min_lr over the rest of the steps."""
    weight_decay: float = Field(0.1, ge=0)
    clip_grad: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0: no clipping."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    logits_precision: Literal["bf16", "fp32"] = "fp32"
    """Of the logits inside the loss. In a bf16 model bf16 logits put 2 to 5 % error into the gradient at 131072 columns."""
    overlap: bool = False
    """Overlap gradient reduction and parameter gathering with computation."""
    recompute: bool = False
    """Recompute activations layer by layer in the backward pass."""
    fp8: FP8Scaling | None = None
    """Products of the linear layers in FP8, with weights, gradients and all else as before; needs Transformer Engine, a GPU of the Ada, Hopper or
    Blackwell kind, and sizes that are multiples of 16 (docs/fp8.md). tensorwise to begin with."""
    tp_comm_overlap: bool = False
    """Overlap tensor parallel communication with products, through buffers that GPUs of one NVLink domain share; needs Transformer Engine and
    parallel.sequence_parallel."""
    cuda_graphs: bool = False
    """Record each layer's forward and backward pass in the first step, and replay them: the host issues a layer in one call instead of some
    hundred. Helps where the GPU waits for the host, at short sequences; needs Transformer Engine and Megatron-Core 0.19."""
    collect_interval: int | None = Field(None, ge=1)
    """Collect Python's garbage each so many steps, on all ranks at once; default: whenever a rank's own count is full, while the others wait."""
    log_interval: int = Field(1, ge=1)
    checkpoint_interval: int = Field(100, ge=1)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    async_save: bool = False
    """Train on while a checkpoint is written: it costs a copy of weights and optimizer in host memory until it is whole."""
    profile: ProfileConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        problems = []
        if self.warmup_steps >= self.steps:
            problems.append(f"warmup_steps {self.warmup_steps} must be smaller than steps {self.steps}")
        if self.min_lr > self.lr:
            problems.append(f"min_lr {self.min_lr} is above lr {self.lr}")
        if self.cuda_graphs and self.recompute:
            problems.append(
                "cuda_graphs replays what the first step kept, recompute keeps nothing: drop one of them"
            )
        if self.profile and self.profile.steps[1] > self.steps:
            problems.append(f"profile.steps {self.profile.steps} goes beyond the last of {self.steps} steps")
        problems += self._problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> list[str]:
        return []


class CorrectionConfig(TrainingConfig):
    """Teacher correction: the unpruned teacher learns the distillation data by cross-entropy before it is scored, cut and distilled from.

    Defaults after 2408.11796, teacher correction: a fifth of the peak learning rate of the teacher's pre-training, 120 warm-up steps, cosine.
    """

    when: Literal["before", "during"] = "before"
    """during: the student is distilled from the teacher while it is corrected, and cut from the original (2408.11796, figure 5); a step of the
    teacher for each of the student's, on the same batches, on the student's ranks."""
    steps: int = Field(1000, ge=1)
    """During distillation: at most its steps; the teacher stays as it is after them."""
    lr: float = Field(6e-5, gt=0)
    """A fifth of the peak learning rate of the teacher's pre-training; 6e-5 is that of Llama 3.1 8B (3e-4)."""
    min_lr: float = Field(1e-6, ge=0)
    warmup_steps: int = Field(120, ge=0)
    baseline: str | None = None
    """Output folder of the same recipe without this section: the report then says what the student has of the correction."""
    divergence: ClassVar = "forward_kl"
    temperature: ClassVar = 1.0
    kl_weight: ClassVar = 0.0
    ce_weight: ClassVar = 1.0
    states: ClassVar = None
