"""The stage plan: it chooses the indices to keep from importance scores and the target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from minitron_mp.config.recipe import Recipe
from minitron_mp.workflow.settings import base_arch, num_dropped_layers
from minitron_mp.workflow.stage import Stage, prunes

if TYPE_CHECKING:
    from minitron_mp.workflow.stage_files import StageFiles


def plan_student(files: StageFiles) -> None:
    """Choose the indices to keep and write plan.json. Needs only numpy."""
    from minitron_mp.console import say, table
    from minitron_mp.models.families.export import exportable_arch, reader_lines
    from minitron_mp.pruning.candidates import candidate_target, chosen
    from minitron_mp.pruning.depth import DepthTrials
    from minitron_mp.pruning.make_plan import make_plan
    from minitron_mp.pruning.scores import Scores

    recipe = files.recipe
    teacher = files.arch("score")
    trials = DepthTrials.load(files.paths["depth"]) if "depth" in files.paths else None
    target = recipe.target
    if "search" in files.paths:
        target = candidate_target(chosen(files.paths["search"]), recipe.target.align)
    plan = make_plan(
        Scores.load(files.paths["score"]),
        teacher,
        target,
        recipe.parallel.tp,
        recipe.export.family,
        recipe.depth,
        trials,
    )
    exported = exportable_arch(plan.student, recipe.export.family, target.align)
    plan.save(files.output, files.manifest.model_copy(update={"arch": plan.student}))
    table("plan", ("size", "teacher", "student", "kept"), plan.summary())
    if plan.dropped:
        say(f"dropped layers (counted from 0): {', '.join(map(str, plan.dropped))}")
    for note in [*plan.notes, *reader_lines(exported)]:
        say(f"note: {note}")


def settings(recipe: Recipe) -> dict[str, object]:
    """Return the sizes of the student, and the choice of layers if it is not the default."""
    from minitron_mp.config.pruning import DepthConfig

    used = {"method", "protect_first", "protect_last"}
    depth = recipe.depth.model_dump(include=used)
    if depth == DepthConfig().model_dump(include=used) or num_dropped_layers(recipe) == 0:
        depth = {}
    return {**_sizes(recipe), **depth}


def _sizes(recipe: Recipe) -> Mapping[str, object]:
    """Return the sizes that the target gives, or the sizes that are computed from its budget.

    Computed sizes must be divisible by tp, but seldom change with it. So tp is not a setting.
    """
    from minitron_mp.pruning.target import resolve_target

    if recipe.search is not None:
        return {}  # the artifact of the search is an input
    if not recipe.target.searched:
        return recipe.target.model_dump(exclude_defaults=True, exclude={"axes", "align"})
    student = resolve_target(base_arch(recipe), recipe.target, recipe.parallel.tp, recipe.export.family)
    return student.sizes()


PLAN = Stage(
    name="plan",
    help="Choose what to keep by importance and target. Needs no GPU and no torchrun.",
    artifact="plan.json",
    inputs=("score",),
    optional_inputs=("depth", "search"),
    settings=settings,
    when=prunes,
    run_on_one_rank=plan_student,
)
