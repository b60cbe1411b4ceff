"""The stage correct: teacher correction by cross-entropy on the distillation text (2408.11796)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron_mp.artifacts.curves import CORRECTION
from minitron_mp.config.recipe import Recipe
from minitron_mp.workflow.settings import blend_settings, loss_settings, run_settings, text_parts
from minitron_mp.workflow.stage import Stage

if TYPE_CHECKING:
    from minitron_mp.workflow.context import StageContext


def run(context: StageContext) -> None:
    """Train the teacher on the distillation text by cross-entropy (2408.11796)."""
    from minitron_mp.workflow.training import run_training

    assert context.recipe.correct is not None
    run_training(context, "import", context.recipe.correct, [CORRECTION])


def settings(recipe: Recipe) -> dict[str, object]:
    """Return the settings of the training run."""
    assert recipe.correct is not None
    return {
        **recipe.correct.result_settings(),
        **run_settings(recipe),
        **loss_settings(recipe),
        **blend_settings(recipe, *text_parts(recipe.correct)),
    }


CORRECT = Stage(
    name="correct",
    help="Train the teacher on the distillation text by cross-entropy, before it is pruned.",
    artifact="teacher_corrected",
    inputs=("import", "data"),
    shared="always",
    settings=settings,
    when=lambda recipe: recipe.distillation_teacher == "correct",
    requirement="a section correct whose `when` is before, for example correct: {steps: 1000}",
    run=run,
    curves=lambda recipe: (CORRECTION,),
    disk_bytes=lambda sizes: sizes.correction,
    has_checkpoints=True,
)
