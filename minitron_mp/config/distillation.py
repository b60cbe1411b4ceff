"""Sections of the recipe that train: correction, distillation, and the teacher beside it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from minitron_mp.config.base import Section
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.training import TrainingConfig


class HiddenStatesConfig(Section):
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
    def _pairs(self) -> HiddenStatesConfig:
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

    def blocks(self, num_layers: int, parallel: ParallelConfig) -> dict[int, list[int]]:
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


class DistillConfig(TrainingConfig):
    """Training of the student on the teacher's distribution (arXiv 2408.11796 table 4 for published settings)."""

    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl"
    """forward_kl: KL(teacher || student), the papers'; reverse_kl: KL(student || teacher); js: Jensen-Shannon, half way between."""
    temperature: float = Field(1.0, gt=0)
    kl_weight: float = Field(1.0, ge=0)
    """Weight of the divergence (of whatever kind), times temperature squared."""
    ce_weight: float = Field(0.0, ge=0)
    """Weight of the cross-entropy with the text; the papers use none."""
    states: HiddenStatesConfig | None = None
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


class TeacherConfig(Section):
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
    parallel: ParallelConfig = ParallelConfig()
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
    def _consistent(self) -> TeacherConfig:
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
