"""The stage search: it ranks candidate sizes and distills the best ones for a short time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron_mp.config.recipe import Recipe
from minitron_mp.workflow.settings import (
    SEARCH_RESULT,
    base_arch,
    blend_settings,
    fp8_teacher,
    loss_settings,
    run_settings,
)
from minitron_mp.workflow.stage import Stage, distillation_teacher, pruning_base

if TYPE_CHECKING:
    from minitron_mp.workflow.context import StageContext

PROGRESS = "search/progress.json"
"""File with the progress of the search. The checkpoints of the candidates are in its folder."""


def run(context: StageContext) -> None:
    """Measure the candidates and choose one."""
    from minitron_mp.workflow.stages.search.candidates import search_sizes

    search_sizes(context)


def settings(recipe: Recipe) -> dict[str, object]:
    """Return the names of the candidates, and the settings of their measurement.

    The settings from which the candidates are computed are not included: the parallel layout is one
    of them, and seldom changes the candidates.
    """
    from minitron_mp.pruning.candidates import candidate_name, training
    from minitron_mp.pruning.search_space import search_candidates

    assert recipe.search is not None
    candidates = search_candidates(recipe, base_arch(recipe))
    measured = recipe.search.model_dump(include={"num_samples", "finalists", "steps"})
    if recipe.search.latency_ms:  # which candidates are fast enough depends on these ranks
        measured |= recipe.search.model_dump(include={"latency_ms", "tolerance", "batch_size", "context"})
        measured["parallel"] = recipe.parallel.model_dump()
    return {
        **measured,
        **run_settings(recipe),
        **loss_settings(recipe),
        **blend_settings(recipe, "calibration", "train"),
        "candidates": sorted(map(candidate_name, candidates)),
        "depth": recipe.depth.model_dump(include={"method", "protect_first", "protect_last"}),
        "distill": training(recipe).result_settings(),
        "teacher precision": recipe.teacher.precision,
        **fp8_teacher(recipe),
    }


SEARCH = Stage(
    name="search",
    help="Rank candidate sizes inside a budget by held-out loss, and distill the best ones for a short time.",
    artifact=SEARCH_RESULT,
    inputs=(pruning_base, distillation_teacher, "data", "score"),
    optional_inputs=("depth",),
    settings=settings,
    when=lambda recipe: recipe.search is not None,
    requirement="a section search, for example search: {parameters: 8B}",
    progress=PROGRESS,
    run=run,
)
