"""The stage evaluate: all models of a recipe on held-out text, in tasks, and their speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron_mp.config.recipe import Recipe
from minitron_mp.workflow.settings import blend_settings, loss_settings, run_settings, task_files
from minitron_mp.workflow.stage import Stage, distillation_teacher, initial_student, pruning_base

if TYPE_CHECKING:
    from minitron_mp.workflow.context import StageContext


def run(context: StageContext) -> None:
    """Evaluate the teacher, the pruned and the distilled student."""
    from minitron_mp.workflow.stages.evaluate.models import evaluate_models

    evaluate_models(context)


def settings(recipe: Recipe) -> dict[str, object]:
    """Return the samples of text, and the items of each task where there are tasks."""
    items = {"task_items": recipe.evaluate.task_items} if recipe.evaluate.tasks else {}
    return {
        "num_samples": recipe.evaluate.num_samples,
        **items,
        **run_settings(recipe),
        **loss_settings(recipe),
        **blend_settings(recipe, "valid"),
    }


def adds_results(name: str) -> bool:
    """Return whether an input or setting adds texts or tasks. Other losses do not depend on it."""
    return name in ("texts", "task_items") or name.startswith("task ")


EVALUATE = Stage(
    name="evaluate",
    help="Measure held-out loss, perplexity and KL of the teacher, the pruned and the distilled student.",
    artifact="evaluation.json",
    inputs=(pruning_base, distillation_teacher, "data", initial_student, "distill"),
    reads_earlier_students=True,
    in_last_round=True,
    optional_inputs=("texts",),
    settings=settings,
    sources=lambda recipe: task_files({f"task {name}": path for name, path in recipe.evaluate.tasks.items()}),
    run=run,
    reads_saved_steps=True,
    adds_results=adds_results,
)
