"""What each stage does once its inputs are there: read artefacts, compute, write one. pipeline.py decides whether and when.

Every function is reached by all ranks of the world and leaves its artefact whole or not at all.
"""

from __future__ import annotations

from minitron_mp.artifacts.checkpoint import save_checkpoint
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import layout_problems
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.pruning.slicing import prune
from minitron_mp.workflow.context import StageContext, copy_assets_from


def prune_teacher(job: StageContext) -> None:
    """Slice the teacher by the plan and write the student."""
    plan = PrunePlan.load(job.paths["plan"])
    model = job.sharded_model(job.recipe.base)
    if plan.teacher != model.arch:
        raise InputError(
            f"{job.paths['plan']} was made for another architecture than {job.paths[job.recipe.base]}; run `minitron-mp plan` again"
        )
    refuse("this layout does not fit the student:", layout_problems(plan.student, job.recipe.parallel.tp))
    state = prune(model, plan)
    save_checkpoint(
        state,
        job.output,
        job.manifest.model_copy(update={"arch": plan.student}),
        copy_assets_from(job.paths["import"]),
    )
