"""The stage export: it writes the student as a Hugging Face folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron_mp.workflow.stage import Stage

if TYPE_CHECKING:
    from minitron_mp.workflow.context import StageContext


def export_student(context: StageContext) -> None:
    """Write the distilled student with its tokenizer and model card."""
    from minitron_mp.artifacts.files import ASSETS
    from minitron_mp.artifacts.hf_folder import export_hf
    from minitron_mp.report.model_card import model_card

    recipe = context.recipe
    assets = context.paths["import"] / ASSETS
    export_hf(
        context.paths["distill"],
        context.output,
        assets=assets,
        dtype=recipe.export.dtype or recipe.precision,
        family=recipe.export.family,
        manifest=context.manifest,
        model_card=lambda arch: model_card(recipe, context.paths, context.manifest, arch.family, assets),
    )


EXPORT = Stage(
    name="export",
    help="Write the student as a Hugging Face folder.",
    artifact="student_hf",
    inputs=("import", "distill"),
    settings=lambda recipe: {**recipe.export.model_dump(), "precision": recipe.precision},
    run=export_student,
    any_ranks=True,
    in_last_round=True,
    reads_saved_steps=True,
    disk_bytes=lambda sizes: sizes.exported_student,
)
