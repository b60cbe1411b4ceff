"""The input of an estimate: two models, a recipe and a number of GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.models.arch import Arch


@dataclass(frozen=True)
class PlanningCase:
    """One distillation to plan. teacher: the model that the student is distilled from."""

    student: Arch
    teacher: Arch
    recipe: Recipe
    world: int
    """GPUs of the job: student, co-students and teacher together."""

    @property
    def teacher_ranks(self) -> int:
        """Return the ranks that hold only the teacher; 0 unless the teacher is remote."""
        return self.recipe.teacher.ranks_in(self.world)

    @property
    def student_ranks(self) -> int:
        """Return the number of ranks that train this student."""
        return self.world - self.teacher_ranks - sum(self.recipe.teacher.siblings.values())

    @property
    def microbatches(self) -> int:
        """Return the microbatches of a step on one replica of the student; at least 1."""
        return microbatches_per_replica(self.recipe.distill, self.recipe.parallel, self.student_ranks)

    def with_recipe(self, recipe: Recipe) -> PlanningCase:
        """Return the same models and GPUs with another recipe."""
        return replace(self, recipe=recipe)

    def with_world(self, world: int) -> PlanningCase:
        """Return the same models and recipe on another number of GPUs."""
        return replace(self, world=world)


def microbatches_per_replica(training: TrainingConfig, parallel: ParallelConfig, ranks: int) -> int:
    """Return the microbatches per step of each data-parallel replica; at least 1.

    ranks: number of ranks that train the model.
    """
    replicas = max(1, ranks // parallel.model_ranks)
    return max(1, training.global_batch_size // training.micro_batch_size // replicas)
