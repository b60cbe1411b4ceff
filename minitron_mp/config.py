"""The recipe: one frozen object from YAML or Python that every stage reads. All checks of user input start here."""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

Aggregation = Literal["mean", "l2", "var"]
FP8 = Literal["tensorwise", "delayed", "blockwise"]
"""How FP8 numbers are scaled. tensorwise: by the largest value of the tensor at hand; delayed: by those of earlier steps, faster, and slow to
start; blockwise: by that of each block of 128 or 128 x 128, the most exact."""


class InputError(ValueError):
    """The user's input cannot be used. The text says what was given, what is allowed and what to do."""


def refuse(title: str, problems: Sequence[str]) -> None:
    """Raise one InputError that lists every problem; do nothing when there is none."""
    if problems:
        raise InputError("\n".join([title, *(f"  - {p}" for p in problems)]))


def must_divide(name: str, size: int, micro_batch_size: int, dp: int, interleaved: int = 1) -> str | None:
    """A sentence for the user unless a batch divides evenly; interleaved: pp under vpp, whose schedule wants multiples of it."""
    unit = micro_batch_size * dp * interleaved
    if size % unit == 0:
        return None
    parts = f"micro_batch_size {micro_batch_size} x data parallel size {dp}" + f" x pp {interleaved}" * (interleaved > 1)
    return f"{name} {size} must be a multiple of {unit} ({parts}); nearest {max(1, round(size / unit)) * unit}"


def _with_suffix(value: Any) -> Any:
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    if isinstance(value, str) and value[-1:].upper() in units:
        try:
            return float(value[:-1]) * units[value[-1].upper()]
        except ValueError:
            raise ValueError(f"{value!r} is no number of parameters; write 8.4e9, 8.4B or 102M") from None
    return value


Count = Annotated[float, BeforeValidator(_with_suffix)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """Text for calibration, training and held-out evaluation."""

    source: str | list[str] = "python-stdlib"
    """Files or folders of .txt and .jsonl (field "text"), or Megatron .bin/.idx prefixes, cut by document into the three parts;
    or "python-stdlib"."""
    calibration: list[str] = []
    """Instead of source: .txt, .jsonl or Megatron .bin/.idx prefixes for each part, used as they are."""
    train: list[str] = []
    valid: list[str] = []
    valid_fraction: float = Field(0.03, gt=0, lt=0.5)
    """Share of the documents of source held out; as many again are for calibration."""
    sequence_length: int = Field(512, ge=2)
    """Tokens a sample."""
    tokenizer: str | None = None
    """Hugging Face tokenizer folder or sentencepiece .model file; default: the model's own."""
    held_out: dict[str, list[str]] = {}
    """Name -> files or folders as above: further texts for `evaluate`, such as what the teacher was trained on: {pretraining: [old/]}."""

    @model_validator(mode="after")
    def _all_parts(self) -> Data:
        if taken := {"source", "python-stdlib", "calibration", "train", "valid"} & self.held_out.keys():
            raise ValueError(f"held_out: {', '.join(sorted(taken))} means something else here; take another name")
        if odd := [name for name in self.held_out if not re.fullmatch(r"[A-Za-z0-9_.-]+", name)]:
            raise ValueError(f"held_out: {odd[0]!r} is to be part of a file's name; use letters, digits, _ . and -")
        given = [name for name in ("calibration", "train", "valid") if getattr(self, name)]
        if given and len(given) < 3:
            missing = sorted({"calibration", "train", "valid"} - set(given))
            raise ValueError(f"{', '.join(given)} given without {', '.join(missing)}; give all three, or only source")
        if given and (self.source != "python-stdlib" or self.valid_fraction != type(self).model_fields["valid_fraction"].default):
            raise ValueError("source and valid_fraction say how to make calibration, train and valid; with these three given, drop them")
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
            problems.append("sequence_parallel splits activations over tensor parallel ranks, with tp 1 there is nothing to split: drop it or raise tp")
        if problems:
            raise ValueError("; ".join(problems))
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


class Target(Section):
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
    _sizes: ClassVar = ("num_layers", "drop_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")

    @model_validator(mode="after")
    def _one_kind(self) -> Target:
        sizes = [getattr(self, name) for name in self._sizes if getattr(self, name)]
        if self.num_layers and self.drop_layers is not None:
            raise ValueError("num_layers and drop_layers both say how deep the student is; give one of them")
        if self.drop_layers is not None and self.drop_layers != sorted({n for n in self.drop_layers if n >= 0}):
            raise ValueError(f"drop_layers {self.drop_layers} is not ascending from 0, each layer once")
        kinds = bool(sizes) + (self.max_parameters is not None) + (self.keep is not None)
        if kinds > 1:
            raise ValueError("sizes, max_parameters and keep are three ways to say one thing; give one of them")
        if sizes and self.axes != ["hidden", "ffn"]:
            raise ValueError("axes says what max_parameters and keep may cut; with sizes there is nothing to choose: drop it")
        return self

    @property
    def searched(self) -> bool:
        """Whether the sizes are to be found, not given."""
        return self.max_parameters is not None or self.keep is not None

    @property
    def given(self) -> bool:
        return self.searched or any(getattr(self, name) for name in self._sizes)


class Depth(Section):
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
    def _one_metric(self) -> Depth:
        problems = []
        if self.metric == "task" and self.task is None:
            problems.append("metric task needs items to be right on; give task: FILE.jsonl")
        if self.metric == "task" and self.method == "cosine":
            problems.append("metric task: without effect with method cosine, which measures nothing; set method: drop, block or greedy, or drop metric")
        own = ["num_samples"] if self.metric == "task" else ["task", "task_items"]
        if ignored := [name for name in own if getattr(self, name) != type(self).model_fields[name].default]:
            problems.append(f"{', '.join(ignored)}: without effect with metric {self.metric}; drop it")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Search(Section):
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
    def _one_budget(self) -> Search:
        given = [name for name in ("parameters", "memory_gib", "latency_ms") if getattr(self, name) is not None]
        problems = [] if len(given) == 1 else [f"give one budget of parameters, memory_gib and latency_ms, given {' and '.join(given) or 'none'}"]
        if given == ["parameters"] and (self.context is not None or self.batch_size != 1):
            problems.append("batch_size and context are those of memory_gib and latency_ms; with parameters drop them")
        if self.ffn_hidden_size and self.mlp_expansion:
            problems.append("ffn_hidden_size and mlp_expansion both list the width of the MLP; drop one of them")
        if given == ["latency_ms"] and not (self.ffn_hidden_size or self.mlp_expansion):
            problems.append("latency_ms is measured for every candidate, so ffn_hidden_size cannot be solved for it: list the sizes to try")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def budget(self) -> tuple[str, float]:
        """(name, value) of the budget."""
        return next((name, value) for name in ("parameters", "memory_gib", "latency_ms") if (value := getattr(self, name)) is not None)

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and most of the budget that a candidate may use."""
        name, value = self.budget
        return (value * (1 - self.tolerance), value * (1 + self.tolerance)) if name == "parameters" else (value * (1 - 2 * self.tolerance), value)

    def rounds(self, students: int) -> list[int]:
        """Step at which each round of distillation of so many students ends; half of them stay after it, one after the last."""
        count = math.ceil(math.log2(students))
        return [max(1, self.steps >> (count - 1 - i)) for i in range(count)]


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
        if self.profile and self.profile.steps[1] > self.steps:
            problems.append(f"profile.steps {self.profile.steps} goes beyond the last of {self.steps} steps")
        problems += self._problems()
        if problems:
            raise ValueError("; ".join(problems))
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
        return [[int(state) if str(state).isdecimal() else state, other] for state, other in value.items()] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _pairs(self) -> States:
        problems = [f"layers: {pair} is no pair of states [student, teacher], counted from 0" for pair in self.layers if len(pair) != 2 or min(pair) < 0]
        own = [pair[0] for pair in self.layers if pair]
        if own != sorted(set(own)):
            problems.append(f"layers: the student's states {own} are not ascending, each once")
        if self.weight != "dynamic" and self.weight <= 0:
            problems.append(f"weight {self.weight}: give a number above 0, or dynamic; without states, drop the section")
        if problems:
            raise ValueError("; ".join(problems))
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
        problems = [] if self.kl_weight or self.ce_weight else ["kl_weight and ce_weight are both 0; nothing would be trained"]
        if self.states and not self.kl_weight:
            problems.append("states go beside the divergence from the teacher, kl_weight is 0: raise it, or drop states")
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
        own = ["parallel", "window", "timeout_s"] * (self.placement != "remote") + ["top_k"] * (self.payload != "topk")
        if ignored := [name for name in own if getattr(self, name) != type(self).model_fields[name].default]:
            problems.append(f"{', '.join(ignored)}: without effect with placement {self.placement} and payload {self.payload}; drop it")
        if self.siblings and self.placement != "remote":
            problems.append("siblings share the stream of a remote teacher; set placement: remote")
        problems += [f"siblings: {path} is given {ranks} ranks; at least 1" for path, ranks in self.siblings.items() if ranks < 1]
        if self.parallel.vpp:
            problems.append("parallel.vpp gains nothing in forward passes alone; drop it")
        if self.window < self.parallel.pp:
            problems.append(f"window {self.window} does not fill the teacher's {self.parallel.pp} pipeline stages; give at least {self.parallel.pp}")
        if self.ranks is not None and self.ranks % self.parallel.model_ranks:
            problems.append(f"ranks {self.ranks} must be a multiple of the teacher's tp x pp x cp = {self.parallel.model_ranks}")
        if self.ranks is not None and self.student_ranks is not None:
            problems.append(f"ranks {self.ranks} and student_ranks {self.student_ranks}: one of them says how the job is divided, drop the other")
        if self.placement != "remote" and (self.ranks or self.student_ranks):
            problems.append(f"ranks and student_ranks divide a job between student and teacher; placement {self.placement} has no ranks of the teacher's own")
        if problems:
            raise ValueError("; ".join(problems))
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


class Evaluate(Section):
    """Loss and perplexity on held-out text, and the KL to the teacher."""

    num_samples: int = Field(64, ge=1)
    micro_batch_size: int = Field(1, ge=1)
    tasks: dict[str, str] = {}
    """Name -> .jsonl of items, choices or last words (tasks.py says in what form): {piqa: tasks/piqa.jsonl}."""
    task_items: int | None = Field(None, ge=1)
    """The first so many of each file; default: all."""


class Export(Section):
    """The Hugging Face folder at the end."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "nemotron"] | None = None
    """Write the student as another family; only llama -> mistral, which computes the same, is possible."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Default: the precision of the run."""


class Recipe(Section):
    """Everything about one compression run."""

    model: str = Field(min_length=1)
    """Hugging Face folder of the teacher: config.json, safetensors, tokenizer."""
    output: str = Field(min_length=1)
    """Folder that gets every artefact."""
    seed: int = Field(1234, ge=0, lt=2**32)
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of weights and activations; optimizer state and gradients are float32."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose layers compute: Megatron-Core's own, or Transformer Engine's. auto: Transformer Engine's in bf16 on a GPU where it is installed."""
    data: Data = Data()
    parallel: Parallel = Parallel()
    correct: Correct | None = None
    """Teacher correction; without this section the teacher stays as it is."""
    score: Score = Score()
    depth: Depth = Depth()
    target: Target = Target()
    search: Search | None = None
    """Instead of sizes or a budget in `target`."""
    distill: Distill = Distill()
    teacher: Teacher = Teacher()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        problems = []
        if self.correct and self.teacher.model:
            problems.append("correct trains the model that is cut, teacher.model is another one: correct that one in a run of its own, and drop one of the two")
        if self.correct and self.corrects_meanwhile:
            problems += self._meanwhile(self.correct)
        if self.search and self.target != Target(align=self.target.align):
            problems.append("search finds the sizes and target says something about them; drop one of the two (target.align may stay)")
        if self.depth.method != "cosine" and self.target.drop_layers is not None:
            problems.append(
                f"target.drop_layers names the layers that go, so there is nothing for depth.method {self.depth.method} to find: drop one of the two"
            )
        if self.search and self.distill.states and len(set(self.search.num_layers)) != 1:
            problems.append("distill.states pairs the layers of one student, candidates of search differ in depth: give one search.num_layers, or drop states")
        if self.search and self.depth.method == "block" and len(set(self.search.num_layers)) != 1:
            problems.append(
                "depth.method block measures blocks of one length, the candidates of search differ in depth; use drop or greedy, or one search.num_layers"
            )
        for name, training in (("correct", self.correct), ("distill", self.distill)):
            if training and self.precision == "fp32" and training.logits_precision == "bf16":
                problems.append(f"{name}.logits_precision bf16 would round a float32 model's loss and gain no time; drop it, or set precision: bf16")
        if self.distill.states:
            t, what = self.teacher, "distill.states needs the teacher's states beside its hidden states"
            if t.placement == "cached":
                problems.append(f"{what}, a cache holds none: set teacher.placement: colocated or remote, or drop the states")
            if t.payload != "hidden":
                problems.append(f"{what}, teacher.payload is {t.payload}: set hidden, or drop the states")
            if t.siblings:
                problems.append("distill.states is for one student, teacher.siblings shares the stream: train them in jobs of their own, or drop the states")
        problems += self._fp8()
        if self.search and self.search.latency_ms and self.search.context:
            parts = (2 * self.parallel.cp if self.parallel.cp > 1 else 1) * (self.parallel.tp if self.parallel.sequence_parallel else 1)
            if self.search.context % parts:
                problems.append(f"search.context {self.search.context} must be a multiple of {parts} (2 cp x tp under context and sequence parallelism)")
        layouts = {"parallel": self.parallel} | ({"teacher.parallel": self.teacher.parallel} if self.teacher.is_remote else {})
        for name, p in layouts.items():
            parts = (2 * p.cp if p.cp > 1 else 1) * (p.tp if p.sequence_parallel else 1)
            if self.data.sequence_length % parts:
                near = max(1, round(self.data.sequence_length / parts)) * parts
                problems.append(
                    f"data.sequence_length {self.data.sequence_length} must be a multiple of {parts} "
                    f"({name}: 2 cp x tp under context and sequence parallelism); nearest {near}"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _fp8(self) -> list[str]:
        """What does not go with FP8 and the other keys of Transformer Engine."""
        problems, trainings = [], {name: t for name, t in (("correct", self.correct), ("distill", self.distill)) if t}
        precisions = {"correct": self.teacher_precision if self.corrects_meanwhile else self.precision, "distill": self.precision}
        for name, training in trainings.items():
            keys = [f"{name}.{key}" for key in ("fp8", "tp_comm_overlap") if getattr(training, key)]
            if keys and self.transformer_impl == "local":
                problems.append(f"{', '.join(keys)} is Transformer Engine's, transformer_impl is local: set transformer_engine or auto")
            if training.fp8 and precisions[name] == "fp32":
                problems.append(f"{name}.fp8 quantises what bf16 holds, the precision is fp32: set precision: bf16, or drop fp8")
            if training.tp_comm_overlap and not self.parallel.sequence_parallel:
                problems.append(f"{name}.tp_comm_overlap overlaps what sequence parallelism sends; set parallel.sequence_parallel: true, or drop it")
        if self.corrects_meanwhile and any(t.tp_comm_overlap for t in trainings.values()):
            problems.append("tp_comm_overlap has buffers for one width of model, with correct.when during two are trained: drop it")
        if self.search and self.distill.tp_comm_overlap:
            problems.append("distill.tp_comm_overlap has buffers for one width of model, search trains several: give the sizes in target, or drop it")
        if self.teacher.fp8:
            if self.transformer_impl == "local":
                problems.append("teacher.fp8 is Transformer Engine's, transformer_impl is local: set transformer_engine or auto")
            if self.teacher_precision == "fp32":
                problems.append("teacher.fp8 quantises what bf16 holds, the teacher's precision is fp32: set teacher.precision: bf16, or drop fp8")
            if self.corrects_meanwhile:
                problems.append("teacher.fp8 is for a teacher that is not trained; with correct.when during set correct.fp8")
        return problems

    def _meanwhile(self, correct: Correct) -> list[str]:
        """What does not go with a teacher that is corrected during distillation."""
        d, problems = self.distill, []
        if self.teacher.placement != "colocated":
            problems.append(f"correct.when during trains the teacher beside the student; teacher.placement {self.teacher.placement} keeps it elsewhere")
        if d.states:
            problems.append("distill.states needs the states of a teacher that is not trained; use correct.when: before")
        if correct.steps > d.steps:
            problems.append(f"correct.steps {correct.steps} is above distill.steps {d.steps}, and the teacher takes a step for each of the student's")
        for name in ("global_batch_size", "micro_batch_size"):
            if getattr(correct, name) != getattr(d, name):
                problems.append(
                    f"correct.{name} {getattr(correct, name)} is not distill.{name} {getattr(d, name)}; during distillation both learn from one batch"
                )
        if "checkpoint_interval" in correct.model_fields_set or "keep_checkpoints" in correct.model_fields_set:
            problems.append("correct.checkpoint_interval and keep_checkpoints: the teacher's state lies in the checkpoints of distill; drop them")
        return problems

    @property
    def teacher_precision(self) -> Literal["bf16", "fp32"]:
        return self.teacher.precision or self.precision

    @property
    def base(self) -> str:
        """The stage whose model is scored and cut."""
        return "correct" if self.correct and self.correct.when == "before" else "import"

    @property
    def corrects_meanwhile(self) -> bool:
        """Whether the teacher is corrected while the student is distilled from it."""
        return self.correct is not None and self.correct.when == "during"

    @property
    def tutor(self) -> str:
        """The stage whose model is distilled from."""
        return "import-teacher" if self.teacher.model else self.base

    @property
    def root(self) -> Path:
        return Path(self.output)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply dotted overrides ("distill.steps=10") and check everything; InputError lists all mistakes."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not Path(path).is_file():
        raise InputError(f"no recipe at {path}; give a YAML file such as examples/quickstart.yaml")
    refuse("an override is a dotted key and a value, like distill.steps=10; this is not:", [text for text in overrides if "=" not in text])
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} or an override cannot be read: {error}") from error
    return make_recipe(values, source=str(path))


def make_recipe(values: Any, source: str = "recipe") -> Recipe:
    """Recipe from nested dictionaries; InputError lists all mistakes, with the nearest key for a misspelt one."""
    if not isinstance(values, dict):
        raise InputError(f"{source} holds {type(values).__name__}, not keys and values")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        refuse(f"{source} cannot be used:", [_sentence(e) for e in error.errors()])
        raise


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML, defaults included."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(recipe.model_dump()), path)


def _sentence(error: Any) -> str:
    """One validation error of pydantic in one line, with the nearest key for an unknown one."""
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in error["loc"][:-1]:
            kinds = typing.get_args(annotation := section.model_fields[part].annotation)
            section = kinds[0] if kinds else annotation  # Correct | None
        known = list(section.model_fields)
        near = difflib.get_close_matches(str(error["loc"][-1]), known, 1, 0.5)
        return f"unknown key {where}" + (f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}")
    if error["type"] == "missing":
        return f"{where} is missing"
    text = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f", given {error['input']!r}"
    return f"{where}: {text}{given}" if where else text
