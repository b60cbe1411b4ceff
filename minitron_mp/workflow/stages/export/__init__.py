"""The stage export: the student becomes a Hugging Face folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron_mp.workflow.stage import Stage

if TYPE_CHECKING:
    from minitron_mp.workflow.context import StageContext


def run(context: StageContext) -> None:
    """Write the distilled student with its tokenizer and model card."""
    from minitron_mp.workflow.stages.export.hf_folder import export_student

    export_student(context)


EXPORT = Stage(
    name="export",
    help="Write the student as a Hugging Face folder.",
    artifact="student_hf",
    inputs=("import", "distill"),
    settings=lambda recipe: {**recipe.export.model_dump(), "precision": recipe.precision},
    run=run,
)
