"""Stages on the ranks of a job: one by itself, or all that are not done.

A single stage refuses inputs that are missing or made from something else, naming the field.
"""

from __future__ import annotations

from minitron_mp.artifacts.manifest import require_artifact
from minitron_mp.console import say, table
from minitron_mp.pruning.candidates import candidate_target, chosen
from minitron_mp.pruning.depth import DepthTrials
from minitron_mp.pruning.plan import PrunePlan, make_plan
from minitron_mp.pruning.scores import Scores
from minitron_mp.pruning.target import exportable_arch
from minitron_mp.workflow.graph import StageGraph


def plan_student(project: StageGraph) -> PrunePlan:
    """Importance -> plan.json. Numpy only: runs on a laptop."""
    teacher = require_artifact(project.paths["score"], "score").arch
    assert teacher is not None
    recipe = project.recipe
    trials = DepthTrials.load(project.paths["depth"]) if "depth" in project.stages else None
    found = project.paths.get("search")
    target = candidate_target(chosen(found), recipe.target.align) if found else recipe.target
    result = make_plan(
        Scores.load(project.paths["score"]),
        teacher,
        target,
        recipe.parallel.tp,
        recipe.export.family,
        recipe.depth,
        trials,
    )
    exportable_arch(result.student, recipe.export.family)
    result.save(project.paths["plan"], project.manifest("plan").model_copy(update={"arch": result.student}))
    table("plan", ("size", "teacher", "student", "kept"), result.summary())
    if result.dropped:
        say(f"layers that go (from 0): {', '.join(map(str, result.dropped))}")
    for note in result.notes:
        say(f"note: {note}")
    return result
