"""The stage prune: it slices the teacher into the student, as the plan lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron_mp.workflow.stage import Stage, prunes, pruning_base

if TYPE_CHECKING:
    from minitron_mp.workflow.context import StageContext


def prune_teacher(context: StageContext) -> None:
    """Slice the teacher by the plan and write the student."""
    from minitron_mp.artifacts.checkpoint import save_checkpoint
    from minitron_mp.artifacts.hf_folder import copy_assets_from
    from minitron_mp.errors import InputError, refuse
    from minitron_mp.models.arch import layout_problems
    from minitron_mp.pruning.plan import PrunePlan
    from minitron_mp.pruning.slicing import prune

    base = context.recipe.pruning_base
    plan = PrunePlan.load(context.paths["plan"])
    model = context.build(base)
    if plan.teacher != model.arch:
        raise InputError(
            f"{context.paths['plan']} was made for another architecture than {context.paths[base]}; "
            "run `minitron-mp plan` again"
        )
    refuse("this layout does not fit the student:", layout_problems(plan.student, context.recipe.parallel.tp))
    save_checkpoint(
        prune(model, plan),
        context.output,
        context.manifest.model_copy(update={"arch": plan.student}),
        copy_assets_from(context.paths["import"]),
    )


PRUNE = Stage(
    name="prune",
    help="Slice the teacher by the plan into the student.",
    artifact="student",
    inputs=(pruning_base, "plan"),
    when=prunes,
    run=prune_teacher,
    disk_bytes=lambda sizes: sizes.pruned_student,
)
