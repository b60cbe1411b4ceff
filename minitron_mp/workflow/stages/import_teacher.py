"""The stage import-teacher: it converts teacher.model to a sharded checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minitron_mp.config.recipe import Recipe
from minitron_mp.workflow.settings import IMPORTED_MODELS, model_files
from minitron_mp.workflow.stage import Stage
from minitron_mp.workflow.stages.import_hf import import_folder

if TYPE_CHECKING:
    from minitron_mp.workflow.context import StageContext


def run(context: StageContext) -> None:
    """Convert the folder of teacher.model."""
    import_folder(context, _folder(context.recipe))


def _folder(recipe: Recipe) -> Path:
    assert recipe.teacher.model is not None
    return Path(recipe.teacher.model)


IMPORT_TEACHER = Stage(
    name="import-teacher",
    help="Convert a separate teacher of distillation to a sharded checkpoint.",
    artifact=IMPORTED_MODELS["import-teacher"],
    shared="always",
    sources=lambda recipe: model_files(str(_folder(recipe))),
    when=lambda recipe: recipe.teacher.model is not None,
    requirement="teacher.model",
    run=run,
    any_ranks=True,
    disk_bytes=lambda sizes: sizes.imported_teacher,
)
