"""Sections of the recipe that train: correction, distillation, and the teacher beside it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from .sections import Parallel, Section

FP8 = Literal["tensorwise", "delayed", "blockwise"]
"""How FP8 numbers are scaled. tensorwise: by the largest value of the tensor at hand; delayed: by those of earlier steps, faster, and slow to
start; blockwise: by that of each block of 128 or 128 x 128, the most exact."""


class Profile(Section):
    """A trace of some steps of a training run, on some ranks."""

    steps: list[int] = Field(min_length=2, max_length=2)
    """[first, last], from 1, as they are logged."""
    ranks: list[int] = Field([0], min_length=1)
    """Of the run; a remote teacher's are not among them."""
    kind: Literal["torch", "nsys"] = "torch"
    """torch: a Chrome trace for each rank in OUTPUT/profile. nsys: tells Nsight Systems, which has to start the job, when to trace."""

    @model_validator(mode="after")
    def _in_order(self) -> Profile:
        if not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(f"steps {self.steps} is no [first, last], counted from 1")
        if min(self.ranks) < 0:
            raise ValueError(f"ranks {self.ranks}: ranks count from 0")
        return self


class Training(Section):
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
    fp8: FP8 | None = None
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
    profile: Profile | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Training:
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


class Correct(Training):
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


class States(Section):
    """States inside the student that are held against the teacher's (2407.14679, tables 17 and 18: it helps where depth was cut a lot, and
    not where it was kept). The loss is L_logits + alpha L_is; L_is is the mean over tokens of the sum over the pairs.

    State j is what layer j is given after its input norm: 0 the embeddings, num_layers the output after the final norm.
    """

    layers: list[list[int]] = Field(min_length=1)
    """State of the student -> state of the teacher: {0: 0, 14: 30}, or pairs [[0, 0], [14, 30]]."""
    kind: Literal["cosine", "mse"] = "cosine"
    """cosine: 1 - cosine similarity; mse: mean over channels of the squared difference."""
    weight: Literal["dynamic"] | float = "dynamic"
    """alpha. dynamic: L_logits / L_is of the step before, 1 in the first; or a number above 0."""

    @field_validator("layers", mode="before")
    @classmethod
    def _as_pairs(cls, value: Any) -> Any:
        return (
            [[int(state) if str(state).isdecimal() else state, other] for state, other in value.items()]
            if isinstance(value, dict)
            else value
        )

    @model_validator(mode="after")
    def _pairs(self) -> States:
        problems = [
            f"layers: {pair} is no pair of states [student, teacher], counted from 0"
            for pair in self.layers
            if len(pair) != 2 or min(pair) < 0
        ]
        own = [pair[0] for pair in self.layers if pair]
        if own != sorted(set(own)):
            problems.append(f"layers: the student's states {own} are not ascending, each once")
        if self.weight != "dynamic" and self.weight <= 0:
            problems.append(
                f"weight {self.weight}: give a number above 0, or dynamic; without states, drop the section"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def blocks(self, num_layers: int, parallel: Parallel) -> dict[int, list[int]]:
        """Pipeline stage of a student of so many layers -> what it needs of the teacher, in units of its hidden size: 0 the hidden states for
        the logits, i + 1 the state of pair i. Stages that need nothing are left out."""
        found: dict[int, list[int]] = {parallel.pp - 1: [0]}
        for number, (state, _) in enumerate(self.layers):
            found.setdefault(parallel.place_of_state(state, num_layers)[0], []).append(number + 1)
        return found

    def problems(self, student_layers: int, teacher_layers: int) -> list[str]:
        """What the depths of the models rule out."""
        limits = (("student", student_layers), ("teacher", teacher_layers))
        return [
            f"distill.states.layers names state {state} of the {role}, which has 0 (embeddings) to {last} (after the final norm)"
            for pair in self.layers
            for state, (role, last) in zip(pair, limits)
            if state > last
        ]


class Distill(Training):
    """Training of the student on the teacher's distribution (arXiv 2408.11796 table 4 for published settings)."""

    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl"
    """forward_kl: KL(teacher || student), the papers'; reverse_kl: KL(student || teacher); js: Jensen-Shannon, half way between."""
    temperature: float = Field(1.0, gt=0)
    kl_weight: float = Field(1.0, ge=0)
    """Weight of the divergence (of whatever kind), times temperature squared."""
    ce_weight: float = Field(0.0, ge=0)
    """Weight of the cross-entropy with the text; the papers use none."""
    states: States | None = None
    """Also match states inside the models; default: logits alone."""

    def _problems(self) -> list[str]:
        problems = (
            []
            if self.kl_weight or self.ce_weight
            else ["kl_weight and ce_weight are both 0; nothing would be trained"]
        )
        if self.states and self.cuda_graphs:
            problems.append(
                "states are read inside the layers, where cuda_graphs runs no Python: drop one of them"
            )
        if self.states and not self.kl_weight:
            problems.append(
                "states go beside the divergence from the teacher, kl_weight is 0: raise it, or drop states"
            )
        return problems


class Teacher(Section):
    """Where the teacher runs while the student is distilled, and what it hands over."""

    model: str | None = None
    """Hugging Face folder of another model to distil from than the one that is cut, with the same vocabulary: iterative compression
    (2407.14679: 15B -> 8B -> 4B, the 15B always the teacher)."""
    placement: Literal["colocated", "remote", "cached"] = "colocated"
    """colocated: on the student's ranks in the student's layout. remote: on ranks of its own, the last ones of the job. cached: the stage
    `cache` runs it over all microbatches first and writes its signals to disk."""
    ranks: int | None = Field(None, ge=1)
    """Remote: how many ranks of the job are the teacher's; default: one copy of the model."""
    student_ranks: int | None = Field(None, ge=1)
    """Remote, instead of `ranks`: how many are the student's; copies of the teacher get all others. A job that comes back with fewer nodes
    (torchrun --nnodes 3:4 --max-restarts 9) then goes on with fewer copies, and with the same loss."""
    parallel: Parallel = Parallel()
    """Remote: the teacher's own layout."""
    precision: Literal["bf16", "fp32"] | None = None
    """Default: the precision of the run."""
    fp8: Literal["tensorwise", "blockwise"] | None = None
    """The teacher's forward passes in `distill`, `cache` and `search` in FP8, its weights kept so, too (half the memory). `evaluate` keeps to
    bf16. Not delayed: the scales would come from the microbatches before, and what the teacher says of one depend on their order."""
    payload: Literal["hidden", "logits", "topk"] = "hidden"
    """Remote: hidden states after the final norm (exact, smallest; the student's last stage holds a copy of the teacher's output layer), logits,
    or the top_k most likely tokens with the mass of the rest (an approximation)."""
    top_k: int = Field(256, ge=1)
    window: int = Field(3, ge=1)
    """Remote: microbatches that a copy of the teacher may be ahead of the student; bounds memory on both sides."""
    siblings: dict[str, int] = {}
    """Remote: recipe -> ranks of further students of this teacher, which `distill` trains in the same job from the same stream. Their ranks
    come between the student's and the teacher's; their recipes say model, text, batches and steps as this one does."""
    timeout_s: float = Field(600, gt=0)
    """Remote: how long either side waits for the other; above the longest pause of the student (a checkpoint)."""

    @model_validator(mode="after")
    def _consistent(self) -> Teacher:
        problems = []
        if self.placement == "colocated" and self.payload != "hidden":
            problems.append(
                f"payload {self.payload} is for a teacher elsewhere; a colocated one hands over hidden states: drop it, or set placement: remote or cached"
            )
        own = ["parallel", "window", "timeout_s"] * (self.placement != "remote") + ["top_k"] * (
            self.payload != "topk"
        )
        if ignored := [name for name in own if getattr(self, name) != type(self).model_fields[name].default]:
            problems.append(
                f"{', '.join(ignored)}: without effect with placement {self.placement} and payload {self.payload}; drop it"
            )
        if self.siblings and self.placement != "remote":
            problems.append("siblings share the stream of a remote teacher; set placement: remote")
        problems += [
            f"siblings: {path} is given {ranks} ranks; at least 1"
            for path, ranks in self.siblings.items()
            if ranks < 1
        ]
        if self.parallel.vpp:
            problems.append("parallel.vpp gains nothing in forward passes alone; drop it")
        if self.window < self.parallel.pp:
            problems.append(
                f"window {self.window} does not fill the teacher's {self.parallel.pp} pipeline stages; give at least {self.parallel.pp}"
            )
        if self.ranks is not None and self.ranks % self.parallel.model_ranks:
            problems.append(
                f"ranks {self.ranks} must be a multiple of the teacher's tp x pp x cp = {self.parallel.model_ranks}"
            )
        if self.ranks is not None and self.student_ranks is not None:
            problems.append(
                f"ranks {self.ranks} and student_ranks {self.student_ranks}: one of them says how the job is divided, drop the other"
            )
        if self.placement != "remote" and (self.ranks or self.student_ranks):
            problems.append(
                f"ranks and student_ranks divide a job between student and teacher; placement {self.placement} has no ranks of the teacher's own"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def is_remote(self) -> bool:
        return self.placement == "remote"

    def ranks_in(self, job_size: int | None) -> int:
        """Ranks that are the teacher's alone in a job of so many; None: one copy where nothing else is said."""
        if not self.is_remote:
            return 0
        if self.student_ranks is None or job_size is None:
            return self.ranks or self.parallel.model_ranks
        return max(0, job_size - self.student_ranks - sum(self.siblings.values()))
