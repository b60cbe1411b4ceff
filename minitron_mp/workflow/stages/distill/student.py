"""The stages that train: correct and distill. Their curves, logs and checkpoints lie beside the artefacts until those are whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minitron_mp.artifacts.checkpoint import load_model
from minitron_mp.models.build import build_model
from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.run import TrainingRun
from minitron_mp.training.teacher_correction import TrainableTeacher
from minitron_mp.workflow.context import StageContext
from minitron_mp.workflow.stages.correct.training import run_training
from minitron_mp.workflow.teacher_source import open_teacher, serve_students


def distill_student(job: StageContext) -> None:
    """Train the student on the teacher's distribution."""
    if job.world.role == "teacher":
        serve_students(job)
    else:
        run_training(
            job,
            "prune",
            job.recipe.distill,
            lambda first, log: (
                _learning_teacher(job, log)
                if job.recipe.corrects_during_distillation
                else open_teacher(job, first)
            ),
        )


def _learning_teacher(job: StageContext, log: Callable[[StepMetrics], None]) -> TrainableTeacher:
    recipe, tutor = job.recipe, job.recipe.distillation_teacher
    assert recipe.correct is not None
    arch = job.arch(tutor)
    chunks = build_model(
        arch, job.world, training=recipe.correct, precision=recipe.teacher_precision, **job.build_options
    )
    load_model(chunks, job.paths[tutor], job.world)
    state: dict[str, Any] = {"checkpoints": None, "manifest": job.manifest}
    return TrainableTeacher(
        TrainingRun(chunks, None, recipe.correct, job.world, vocab_size=arch.vocab_size, on_step=log, **state)
    )
