"""The stage import: it converts a Hugging Face folder to a sharded checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minitron_mp.console import say
from minitron_mp.workflow.settings import IMPORTED_MODELS, model_files
from minitron_mp.workflow.stage import Stage

if TYPE_CHECKING:
    from minitron_mp.workflow.context import StageContext


def run(context: StageContext) -> None:
    """Convert the folder of the recipe's model."""
    import_folder(context, Path(context.recipe.model))


def import_folder(context: StageContext, source: Path) -> None:
    """Convert a Hugging Face folder, in the dtype of its weights."""
    from minitron_mp.artifacts.hf_folder import import_hf
    from minitron_mp.report.model_card import source_card_problem

    if problem := source_card_problem(source):
        say(f"note: {problem}")
    import_hf(source, context.output, context.manifest)


IMPORT = Stage(
    name="import",
    help="Convert a Hugging Face folder to a sharded checkpoint.",
    artifact=IMPORTED_MODELS["import"],
    shared="always",
    sources=lambda recipe: model_files(recipe.model),
    run=run,
    any_ranks=True,
    disk_bytes=lambda sizes: sizes.imported_base,
)
