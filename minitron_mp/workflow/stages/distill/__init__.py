"""The stage distill: it trains the student on the teacher's distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron_mp.artifacts.curves import CORRECTION, DISTILLATION, Curve
from minitron_mp.config.recipe import Recipe
from minitron_mp.workflow.settings import blend_settings, fp8_teacher, loss_settings, run_settings, text_parts
from minitron_mp.workflow.stage import Stage, distillation_teacher, initial_student

if TYPE_CHECKING:
    from minitron_mp.workflow.context import StageContext


def run(context: StageContext) -> None:
    """Train the student. The ranks of a remote teacher serve it."""
    from minitron_mp.workflow.stages.distill.student import distill_student

    distill_student(context, curves(context.recipe))


def settings(recipe: Recipe) -> dict[str, object]:
    """Return the settings of the training run and of its teacher.

    The placement and layout of the teacher are not included, because they change its signals only
    by rounding. A top-k payload changes the loss.
    """
    teacher = {
        "precision": recipe.teacher.precision,
        "top_k": recipe.teacher.top_k if recipe.teacher.payload == "topk" else None,
        **fp8_teacher(recipe),
    }
    result = {
        **recipe.distill.result_settings(),
        **run_settings(recipe),
        **loss_settings(recipe),
        **blend_settings(recipe, *text_parts(recipe.distill)),
        "teacher": teacher,
    }
    if recipe.correct and recipe.corrects_during_distillation:
        result["correct"] = recipe.correct.result_settings()
    return result


def curves(recipe: Recipe) -> tuple[Curve, ...]:
    """Return the student's curve, after that of a teacher that is corrected at the same time."""
    return (CORRECTION, DISTILLATION) if recipe.corrects_during_distillation else (DISTILLATION,)


DISTILL = Stage(
    name="distill",
    help="Train the student on the teacher's distribution.",
    artifact="student_distilled",
    inputs=(distillation_teacher, "data", initial_student),
    unrecorded_inputs=("cache",),
    settings=settings,
    run=run,
    meets_roles=True,
    curves=curves,
    disk_bytes=lambda sizes: sizes.distillation,
    has_checkpoints=True,
)
