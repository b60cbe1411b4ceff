"""The stage depth: it measures the teacher without single layers, or without blocks of layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron_mp.config.recipe import Recipe
from minitron_mp.workflow.settings import (
    blend_settings,
    drops_layers,
    loss_settings,
    num_dropped_layers,
    run_settings,
    task_files,
)
from minitron_mp.workflow.stage import Stage, pruning_base

if TYPE_CHECKING:
    from minitron_mp.workflow.context import StageContext


def run(context: StageContext) -> None:
    """Measure the trials of depth.method."""
    from minitron_mp.workflow.stages.depth.trials import measure_depth

    measure_depth(context)


def settings(recipe: Recipe) -> dict[str, object]:
    """Return the settings of the metric, and the number of dropped layers if it matters."""
    unused = {"num_samples", "task"} if recipe.depth.metric == "task" else {"metric", "task", "task_items"}
    used = {name: value for name, value in recipe.depth.result_settings().items() if name not in unused}
    # The trials of single layers are valid for any number of dropped layers.
    count = {} if recipe.depth.method == "drop" else {"layers to drop": num_dropped_layers(recipe)}
    text: dict[str, object] = {}
    if recipe.depth.metric == "loss":
        text = {**loss_settings(recipe), **blend_settings(recipe, "calibration")}
    return {**used, **run_settings(recipe), **text, **count}


DEPTH = Stage(
    name="depth",
    help="Measure the loss or task accuracy of the teacher without single layers or blocks of layers.",
    artifact="depth.json",
    inputs=(pruning_base, "data"),
    settings=settings,
    sources=lambda recipe: task_files({"task": recipe.depth.task} if recipe.depth.task else {}),
    when=lambda recipe: recipe.prunes and recipe.depth.method != "cosine" and drops_layers(recipe),
    requirement="depth.method: drop, block or greedy, and a target of fewer layers",
    run=run,
)
