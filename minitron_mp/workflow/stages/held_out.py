"""The stage texts: it tokenizes the further held-out texts of data.held_out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron_mp.workflow.settings import text_files, text_settings
from minitron_mp.workflow.stage import Stage
from minitron_mp.workflow.stages.tokenize import short_texts, tokenize_share, tokenize_text

if TYPE_CHECKING:
    from minitron_mp.data.shards import Share
    from minitron_mp.workflow.stage_files import StageFiles


def run(files: StageFiles) -> None:
    """Write one dataset for each text."""
    tokenize_text(files, held_out=True)


def run_share(files: StageFiles, share: Share) -> None:
    """Make a share of the shards of the texts."""
    tokenize_share(files, share, held_out=True)


def problems(files: StageFiles) -> list[str]:
    """Return the texts that are too short for evaluate."""
    return short_texts(files, dict.fromkeys(files.recipe.data.held_out, files.recipe.evaluate.num_samples))


HELD_OUT = Stage(
    name="texts",
    help="Tokenize further held-out texts.",
    artifact="held_out",
    inputs=("import",),
    shared="if equal",
    settings=text_settings,
    sources=lambda recipe: text_files(recipe, held_out=True),
    when=lambda recipe: bool(recipe.data.held_out),
    requirement="data.held_out",
    run_on_one_rank=run,
    run_share=run_share,
    problems=problems,
)
