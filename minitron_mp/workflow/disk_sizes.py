"""Estimated sizes of the models, checkpoints and teacher signals that stages write to disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from minitron_mp.config.recipe import Recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.models.arch import Arch
from minitron_mp.models.number_formats import BYTES
from minitron_mp.planning.memory import payload_bytes_per_token, rank_parameters
from minitron_mp.pruning.search_space import possible_students


@dataclass(frozen=True)
class DiskSizes:
    """Bytes of what the stages of a recipe write. Each stage returns its part (Stage.disk_bytes).

    base: the model of the recipe. teacher: the teacher of distillation. pruned: the model that this
    round prunes; base in the first round.
    """

    recipe: Recipe
    base: Arch
    teacher: Arch
    pruned: Arch

    @cached_property
    def imported_base(self) -> float:
        """The model that is pruned, in the dtype of its files."""
        return self._model_on_disk(self.recipe.model, self.base)

    @cached_property
    def imported_teacher(self) -> float:
        """The teacher of distillation, in the dtype of its files."""
        return self._model_on_disk(self.recipe.teacher.model or self.recipe.model, self.teacher)

    @cached_property
    def pruned_student(self) -> float:
        """The student, in the dtype of the files of the model that is pruned."""
        return self.imported_base * self._num_student / self._num_parameters(self.base)

    @cached_property
    def exported_student(self) -> float:
        return BYTES[self.recipe.export.dtype or self.recipe.precision] * self._num_student

    @cached_property
    def correction(self) -> float:
        """The corrected teacher and its checkpoints; 0 without teacher correction."""
        settings = self.recipe.correct
        if settings is None:
            return 0.0
        return self._training(self._num_parameters(self.base), settings)

    @cached_property
    def distillation(self) -> float:
        """The distilled student, its checkpoints, and a teacher that is corrected at the same time."""
        student = self._training(self._num_student, self.recipe.distill)
        return student + (self.correction if self.recipe.corrects_during_distillation else 0.0)

    @cached_property
    def teacher_signals(self) -> float:
        """The teacher's signals for all microbatches of distillation."""
        settings = self.recipe.distill
        num_tokens = settings.steps * settings.global_batch_size * self.recipe.data.sequence_length
        return num_tokens * payload_bytes_per_token(self.teacher, self.recipe)

    @cached_property
    def _num_student(self) -> int:
        """Return the parameters of the student, or of the largest candidate of a search."""
        return max(self._num_parameters(arch) for arch in possible_students(self.recipe, self.pruned))

    def _num_parameters(self, arch: Arch) -> int:
        """Return the parameters of a model over all ranks, with vocabulary padding."""
        one_rank = self.recipe.parallel.model_copy(update={"tp": 1, "pp": 1, "vpp": None})
        return rank_parameters(arch, one_rank)[0]

    def _model_on_disk(self, folder: str, arch: Arch) -> float:
        """Return the size of the weight files of a model, or an estimate if there are none."""
        on_disk = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        return on_disk or BYTES[self.recipe.precision] * self._num_parameters(arch)

    def _training(self, num_parameters: int, settings: TrainingConfig) -> float:
        """Return the bytes of the model, the kept checkpoints, and the one that is being written.

        Checkpoints have float32 weights and moments.
        """
        size = BYTES[self.recipe.precision]
        num_checkpoints = settings.keep_checkpoints + 1
        if settings.valid_interval:
            num_checkpoints += 1  # the best one
        if settings.keep_every:
            num_checkpoints += settings.steps // settings.keep_every
        return size * num_parameters + (size + 12) * num_parameters * num_checkpoints
