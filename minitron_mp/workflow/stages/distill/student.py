"""The stages that train: correct and distill. Their curves, logs and checkpoints lie beside the artefacts until those are whole."""

from __future__ import annotations

from collections.abc import Callable

from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.run import RunOptions, TrainingRun
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
    settings = job.recipe.correct
    assert settings is not None
    options = RunOptions(None, job.manifest, seed=job.recipe.seed, on_step=log)
    return TrainableTeacher(TrainingRun(job.teacher_model(training=settings), None, settings, options))
