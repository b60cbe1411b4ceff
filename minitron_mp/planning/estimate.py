"""The estimate of one layout: seconds, memory, GPU-hours and utilisation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from minitron_mp.config.recipe import Recipe
from minitron_mp.models.flops import forward_flops, training_flops
from minitron_mp.planning.case import PlanningCase
from minitron_mp.planning.memory import Parts, distillation_memory, fullest, remote_teacher_memory
from minitron_mp.planning.model_pass import LOSS, RECOMPUTE, STUDENT, TEACHER, Traffic

DP = "data parallel"
BUBBLE = "pipeline bubble"
UNEVEN = "uneven stages"
OPTIMIZER = "optimizer"
WAIT = "waiting for the teacher"
STREAM = "teacher stream"

WORK = (STUDENT, TEACHER, LOSS, RECOMPUTE)
"""Parts of a step that are computation. All other parts are overhead of the layout."""


@dataclass(frozen=True)
class Estimate:
    """Estimate of one layout."""

    case: PlanningCase
    seconds: Parts
    """Seconds of a step by part, from arithmetic. Their sum is arithmetic_s."""
    traffic: dict[str, Traffic]
    basis: str
    """The least certain of the sources of the times (times.py)."""
    correction: float = 1.0
    """Expected / arithmetic time of a step (published.py)."""

    @property
    def recipe(self) -> Recipe:
        return self.case.recipe

    @property
    def tokens(self) -> int:
        """Return the number of tokens in a step."""
        return self.recipe.distill.global_batch_size * self.recipe.data.sequence_length

    @cached_property
    def arithmetic_s(self) -> float:
        """Return the seconds of a step, as the parts add up."""
        return sum(self.seconds.values())

    @property
    def step_s(self) -> float:
        """Return the expected seconds of a step: corrected towards published rates."""
        return self.arithmetic_s * self.correction

    @cached_property
    def memory(self) -> Parts:
        """Return the bytes by part on the fullest GPU of the student."""
        return fullest(distillation_memory(self.case))

    @cached_property
    def teacher_memory(self) -> Parts:
        """Return the bytes by part on the fullest GPU of a remote teacher; {} without one."""
        if not self.recipe.teacher.is_remote:
            return {}
        stages = range(self.recipe.teacher.parallel.pp)
        return fullest([remote_teacher_memory(self.case.teacher, self.recipe, stage) for stage in stages])

    @cached_property
    def needed_bytes(self) -> float:
        """Return the bytes on the fullest GPU of the job."""
        return max(sum(self.memory.values()), sum(self.teacher_memory.values()))

    @property
    def tokens_per_gpu_s(self) -> float:
        return self.tokens / self.step_s / self.case.world

    @property
    def tflops(self) -> float:
        """Return the TFLOP/s of both models per GPU. FLOPs are model FLOPs (models/flops.py)."""
        sequence_length = self.recipe.data.sequence_length
        student = training_flops(self.case.student, sequence_length)
        teacher = forward_flops(self.case.teacher, sequence_length)
        return (student + teacher) * self.tokens_per_gpu_s / 1e12

    @property
    def hours(self) -> float:
        """Return the hours of the distillation."""
        return self.step_s * self.recipe.distill.steps / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.case.world

    @property
    def largest_overhead(self) -> tuple[str, float]:
        """Return (largest part that is not computation, its share of the step)."""
        overheads = [name for name in self.seconds if name not in WORK]
        name = max(overheads, key=lambda name: self.seconds[name])
        return name, self.seconds[name] / self.arithmetic_s
