"""The work of the stage distill, on the student's ranks and on the ranks of a remote teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from minitron_mp.artifacts.curves import CORRECTION, Curve
from minitron_mp.distillation.teacher import Teacher
from minitron_mp.training.options import RunOptions
from minitron_mp.training.run import TrainingRun
from minitron_mp.training.run_checkpoint import ResumePoint
from minitron_mp.training.teacher_correction import TrainableTeacher
from minitron_mp.workflow.context import StageContext
from minitron_mp.workflow.fp8_teacher import log_fp8_teacher_kl
from minitron_mp.workflow.teacher_source import open_teacher, serve_students
from minitron_mp.workflow.training import OnStep, run_training


def distill_student(context: StageContext, curves: Sequence[Curve]) -> None:
    """Train the student on the teacher's distribution.

    The ranks of a remote teacher serve the students instead. curves: Stage.curves of `distill`.
    """
    if context.world.role == "teacher":
        serve_students(context)
        return

    def make_teacher(start: ResumePoint, on_teacher_step: OnStep) -> Teacher:
        teacher: Teacher
        if context.recipe.corrects_during_distillation:
            teacher = _trainable_teacher(context, on_teacher_step)
        else:
            teacher = open_teacher(replace(context, manifest=start.manifest), start.step)
        # The ranks of a remote teacher call it, too, and only in this stage.
        log_fp8_teacher_kl(context, teacher.model)
        return teacher

    run_training(context, context.recipe.initial_student, context.recipe.distill, curves, make_teacher)


def _trainable_teacher(context: StageContext, on_step: OnStep) -> TrainableTeacher:
    settings = context.recipe.correct
    assert settings is not None
    # Without checkpoints the manifest only names the run in the log.
    manifest = context.manifest.model_copy(update={"stage": CORRECTION.name})
    options = RunOptions(None, manifest, seed=context.recipe.seed, on_step=on_step)
    return TrainableTeacher(TrainingRun(context.teacher_model(training=settings), None, settings, options))
