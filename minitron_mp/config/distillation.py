"""The sections distill and teacher: the training of the student, and where the teacher runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from minitron_mp.config.base import Section
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.paths import UserPath
from minitron_mp.config.training import TrainingConfig
from minitron_mp.losses.parameters import complete_parameters


class HiddenStatesConfig(Section):
    """Pairs of hidden states of student and teacher that are matched.

    The loss is L_logits + alpha L_is. L_is is the sum over the pairs of states, averaged over
    tokens. It helps when many layers were dropped, and does not help when depth was kept
    (2407.14679, tables 17 and 18).

    State j is the input of layer j after its input norm: 0 is the embeddings, num_layers the output
    of the final norm.
    """

    layers: list[list[int]] = Field(min_length=1)
    """State of the student -> state of the teacher: {0: 0, 14: 30}, or pairs [[0, 0], [14, 30]]."""
    kind: Literal["cosine", "mse"] = "cosine"
    """cosine: 1 - cosine similarity. mse: squared difference, averaged over channels."""
    weight: Literal["dynamic"] | float = "dynamic"
    """Weight alpha: a number above 0, or dynamic. dynamic: L_logits / L_is of the previous step,
    and 1 in the first step."""

    @field_validator("layers", mode="before")
    @classmethod
    def _as_pairs(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return [
            [int(student) if str(student).isdecimal() else student, teacher]
            for student, teacher in value.items()
        ]

    @model_validator(mode="after")
    def _pairs(self) -> HiddenStatesConfig:
        problems = [
            f"layers: {pair} must be [state of the student, state of the teacher], counted from 0; "
            "write such a pair"
            for pair in self.layers
            if len(pair) != 2 or min(pair) < 0
        ]
        student_states = [pair[0] for pair in self.layers if pair]
        if student_states != sorted(set(student_states)):
            problems.append(
                f"layers: the student's states {student_states} must be ascending, without repeats; "
                "sort the pairs by them"
            )
        if self.weight != "dynamic" and self.weight <= 0:
            problems.append(
                f"weight {self.weight} must be above 0, or dynamic; drop the section to match no states"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def blocks(self, num_layers: int, parallel: ParallelConfig) -> dict[int, list[int]]:
        """Return pipeline stage of the student -> blocks of the teacher's signal that it needs.

        Block 0 is the hidden states for the logits. Block i + 1 is the state of pair i. Each block
        has the teacher's hidden size. Stages that need no block are left out. num_layers: depth of
        the student.
        """
        blocks: dict[int, list[int]] = {parallel.pp - 1: [0]}
        for number, (state, _) in enumerate(self.layers):
            stage, _ = parallel.place_of_state(state, num_layers)
            blocks.setdefault(stage, []).append(number + 1)
        return blocks

    def problems(self, student_layers: int, teacher_layers: int) -> list[str]:
        """Return one error text for each state that a model does not have."""
        limits = (("student", student_layers), ("teacher", teacher_layers))
        return [
            f"distill.states.layers has state {state} of the {role}, "
            f"whose states are 0 (embeddings) to {last} (after the final norm); use one of those"
            for pair in self.layers
            for state, (role, last) in zip(pair, limits)
            if state > last
        ]


class DistillConfig(TrainingConfig):
    """Training of the student on the teacher's distribution (settings: 2408.11796, table 4)."""

    divergence: Literal[
        "forward_kl",
        "reverse_kl",
        "skewed_forward_kl",
        "js",
    ] = "forward_kl"
    """forward_kl: KL(teacher || student), as in the papers. reverse_kl: KL(student || teacher).
    skewed_forward_kl: KL(teacher || skew teacher + (1 - skew) student), 2402.03898.
    js: Jensen-Shannon.
    Formulas: docs/distillation.md."""
    divergence_parameters: dict[str, float] | None = Field(default=None, validate_default=True)
    """Parameters of the divergence, by name. Their limits and defaults: docs/distillation.md."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of both distributions."""
    kl_weight: float = Field(default=1.0, ge=0)
    """Weight of the divergence. The loss also multiplies it by the temperature squared."""
    ce_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy with the text. The papers use 0."""
    states: HiddenStatesConfig | None = None
    """Match hidden states, too. Default: match the logits only."""

    @field_validator("divergence_parameters")
    @classmethod
    def _complete(cls, given: dict[str, float] | None, info: ValidationInfo) -> dict[str, float] | None:
        """Fill in the defaults of the divergence. None without parameters."""
        if "divergence" not in info.data:  # it has an error itself
            return given
        return complete_parameters(info.data["divergence"], given or {}) or None

    def _problems(self) -> list[str]:
        problems = []
        if not self.kl_weight and not self.ce_weight:
            problems.append("kl_weight and ce_weight are both 0; set one of them above 0")
        if self.states and self.cuda_graphs:
            problems.append("states and cuda_graphs cannot be combined; drop one of them")
        if self.states and not self.kl_weight:
            problems.append("states needs kl_weight above 0, given 0; raise it, or drop states")
        return problems


class TeacherConfig(Section):
    """Where the teacher runs while the student is distilled, and what it sends."""

    model: UserPath | None = None
    """Hugging Face folder of the teacher of distillation, if it is not the model that is pruned.
    Both must have the same vocabulary. Use it for iterative compression in several runs (2407.14679:
    15B -> 8B -> 4B, with the 15B model as the teacher). `rounds` do it in one run."""
    placement: Literal["colocated", "remote", "cached"] = "colocated"
    """colocated: the teacher runs on the student's ranks, in the student's layout. remote: it runs
    on separate ranks, the last ranks of the job. cached: the stage `cache` runs the teacher first
    and writes its signals to disk."""
    ranks: int | None = Field(default=None, ge=1)
    """Ranks of a remote teacher. Default: as many as one copy of the model needs."""
    student_ranks: int | None = Field(default=None, ge=1)
    """Ranks of the student, for a remote teacher. Replaces `ranks`: copies of the teacher use all
    remaining ranks. So a job that restarts with fewer nodes (torchrun --nnodes 3:4 --max-restarts
    9) resumes with fewer copies and the same loss."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of a remote teacher, with the keys of the section `parallel`."""
    precision: Literal["bf16", "fp32"] | None = None
    """Precision of the teacher. Default: `precision`."""
    fp8: Literal["tensorwise", "blockwise"] | None = None
    """Run the teacher's forward passes in `distill`, `cache` and `search` in FP8, with FP8 weights
    (half the memory). `evaluate` uses bf16. Delayed scaling is not allowed, because the teacher's
    signals would depend on the order of the microbatches."""
    payload: Literal["hidden", "logits", "topk"] = "hidden"
    """Content of the signals of a remote or cached teacher. hidden: hidden states after the final
    norm. They are exact and the smallest payload, but the student's last stage holds a copy of the
    teacher's output layer. logits: all logits. topk: the `top_k` most likely tokens and the
    probability of the rest (an approximation)."""
    top_k: int = Field(default=256, ge=1)
    """Tokens per position, for payload topk."""
    window: int = Field(default=3, ge=1)
    """Largest number of microbatches by which a copy of a remote teacher may be ahead of the
    student. It limits memory on both sides."""
    siblings: dict[UserPath, int] = {}
    """Further students of a remote teacher: path of a recipe -> number of ranks. `distill` trains
    them in the same job from the same stream. Their ranks come after the student's ranks and
    before the teacher's. Their recipes must have the same model, text, batches and steps."""
    timeout_s: float = Field(default=600, gt=0)
    """Timeout of the waits between student and remote teacher, in seconds. It must be longer than
    the longest pause of the student, which is usually a checkpoint."""

    @model_validator(mode="after")
    def _consistent(self) -> TeacherConfig:
        problems = self._ignored_keys() + self._rank_problems()
        if self.placement == "colocated" and self.payload != "hidden":
            problems.append(
                f"payload {self.payload} needs placement remote or cached, given colocated; drop payload, "
                "or set placement"
            )
        if self.siblings and self.placement != "remote":
            problems.append(f"siblings needs placement remote, given {self.placement}; set placement: remote")
        if self.parallel.vpp:
            problems.append(
                f"parallel.vpp {self.parallel.vpp} is not supported for a teacher, because it does not speed "
                "up forward passes; drop it"
            )
        if self.parallel.teacher_layers:
            problems.append(
                "parallel.teacher_layers: all models in this layout are the teacher; set parallel.layers of "
                "the section teacher instead"
            )
        if self.window < self.parallel.pp:
            problems.append(
                f"window {self.window} must be at least the teacher's pp {self.parallel.pp}, to fill its "
                "pipeline; raise window, or lower teacher.parallel.pp"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _ignored_keys(self) -> list[str]:
        unused = [] if self.is_remote else ["parallel", "window", "timeout_s"]
        if self.payload != "topk":
            unused.append("top_k")
        ignored = self.changed(unused)
        if not ignored:
            return []
        return [
            f"{', '.join(ignored)}: no effect with placement {self.placement} and payload {self.payload}; "
            "drop it"
        ]

    def _rank_problems(self) -> list[str]:
        problems = [
            f"siblings: {path} has {ranks} ranks, at least 1 is needed; raise it"
            for path, ranks in self.siblings.items()
            if ranks < 1
        ]
        if self.ranks is not None and self.ranks % self.parallel.model_ranks:
            problems.append(
                f"ranks {self.ranks} must be a multiple of the teacher's tp x pp x cp = "
                f"{self.parallel.model_ranks}; change ranks or teacher.parallel"
            )
        if self.ranks is not None and self.student_ranks is not None:
            problems.append(
                f"ranks {self.ranks} and student_ranks {self.student_ranks} exclude each other; drop one "
                "of them"
            )
        if not self.is_remote and (self.ranks or self.student_ranks):
            problems.append(
                f"ranks and student_ranks need placement remote, given {self.placement}; drop them, or set "
                "placement"
            )
        return problems

    @property
    def is_remote(self) -> bool:
        """Whether the teacher has separate ranks."""
        return self.placement == "remote"

    def ranks_in(self, job_size: int | None) -> int:
        """Return the number of teacher ranks in a job of `job_size` ranks.

        job_size None: return `ranks`, or the ranks of one copy.
        """
        if not self.is_remote:
            return 0
        if self.student_ranks is None or job_size is None:
            return self.ranks or self.parallel.model_ranks
        return max(0, job_size - self.student_ranks - sum(self.siblings.values()))
