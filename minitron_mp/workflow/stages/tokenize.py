"""The stage data: it tokenizes text into Megatron indexed datasets."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_mp.workflow.settings import text_files, text_settings
from minitron_mp.workflow.stage import Stage
from minitron_mp.workflow.stage_files import TOKENIZER, tokenizer_path

if TYPE_CHECKING:
    from minitron_mp.workflow.context import StageContext
    from minitron_mp.workflow.stage_files import StageFiles

PROGRESS_DOCUMENTS = 250
"""Number of documents between two progress lines."""


def run(context: StageContext) -> None:
    """Write the calibration, training and held-out parts of the text."""
    tokenize_text(context, held_out=False)


def tokenize_text(context: StageContext, *, held_out: bool) -> None:
    """Write the three parts of the text, or with held_out the texts of data.held_out.

    Rank 0 writes, and the other ranks wait.
    """
    from minitron_mp.artifacts.manifest import writing_artifact
    from minitron_mp.console import say
    from minitron_mp.data.corpus import tokenize_corpus
    from minitron_mp.data.unused import load_unused
    from minitron_mp.distributed.launcher import environment_variable
    from minitron_mp.distributed.sync import on_rank_0
    from minitron_mp.errors import InputError

    recipe = context.recipe
    stage = context.manifest.stage
    last_shown = 0

    def progress(documents: int) -> None:
        nonlocal last_shown
        if documents - last_shown >= PROGRESS_DOCUMENTS:
            last_shown = documents
            say(f"{stage}: {documents} documents")

    def write() -> None:
        tokenizer = context.tokenizer()
        try:
            # The launch scripts disable the tokenizer's threads, because they break processes that
            # are forked later. No process is forked here.
            with (
                environment_variable("TOKENIZERS_PARALLELISM", "true"),
                writing_artifact(context.output, context.manifest) as folder,
            ):
                tokens = tokenize_corpus(
                    recipe.data,
                    tokenizer,
                    folder,
                    recipe.seed,
                    held_out=held_out,
                    output=recipe.root,
                    progress=progress,
                )
                if recipe.data.tokenizer and not held_out:
                    _copy_tokenizer(tokenizer_path(recipe, context.paths), folder / TOKENIZER)
        except OSError as error:
            raise InputError(f"{context.output} cannot be written: {error}; set another output") from error
        say(f"{stage}: " + ", ".join(f"{part} {count:,} tokens" for part, count in tokens.items()))
        not_used = load_unused(context.output).summary()
        if not_used:
            say(f"{stage}: text that is not used, or not as it is: {not_used}")

    on_rank_0(write, takes_long=True)


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy data.tokenizer, because later stages read it, and the user may delete it.

    source: data.tokenizer, or its copy in the artifact that is replaced.
    """
    from minitron_mp.models.model_folder import copy_asset_files

    target.mkdir()
    if source.is_file():
        shutil.copy(source, target)
    else:
        copy_asset_files(source, target)


def problems(files: StageFiles) -> list[str]:
    """Return the parts that are too short for a stage that would run hours later."""
    recipe = files.recipe
    calibration = [recipe.score.num_samples]
    if "depth" in files.paths and recipe.depth.metric == "loss":
        calibration.append(recipe.depth.num_samples)
    if recipe.search:
        calibration.append(recipe.search.num_samples)
    num_samples = {"calibration": max(calibration), "train": 0, "valid": recipe.evaluate.num_samples}
    return short_texts(files, num_samples) or _blend_problems(files) or _short_validations(files)


def _blend_problems(files: StageFiles) -> list[str]:
    """Return a sentence if the samples of distill do not fit the shares of data.train."""
    from minitron_mp.data.batches import blend_of
    from minitron_mp.data.blend import blend_problem

    recipe = files.recipe
    blend = blend_of(files.output, recipe.data, "train")
    if not blend:
        return []
    problem = blend_problem("train", blend, recipe.distill.num_samples, recipe.data.sequence_length)
    return [problem] if problem else []


def _short_validations(files: StageFiles) -> list[str]:
    """Return a sentence for each training run whose validations need more held-out text."""
    from minitron_mp.data.batches import too_short_problems

    recipe = files.recipe
    problems = []
    for name, training in (("correct", recipe.correct), ("distill", recipe.distill)):
        if training is None or not training.valid_interval:
            continue
        num_samples = training.valid_batches * training.global_batch_size
        setting = f"{name}.valid_batches x global_batch_size"
        problems += too_short_problems(
            files.output, "valid", recipe.data.sequence_length, num_samples, setting=setting
        )
    return problems


def short_texts(files: StageFiles, num_samples: dict[str, int]) -> list[str]:
    """Return a sentence for each text without its number of samples."""
    from minitron_mp.data.batches import too_short_problems

    length = files.recipe.data.sequence_length
    return [
        problem
        for text, count in num_samples.items()
        for problem in too_short_problems(files.output, text, length, count)
    ]


TOKENIZE = Stage(
    name="data",
    help="Tokenize the text into calibration, training and held-out parts.",
    artifact="data",
    inputs=("import",),
    settings=lambda recipe: {
        "valid_fraction": recipe.data.valid_fraction,
        **({} if recipe.data.valid_tokens is None else {"valid_tokens": recipe.data.valid_tokens}),
        "seed": recipe.seed,
        **text_settings(recipe),
    },
    sources=lambda recipe: text_files(recipe, held_out=False),
    run=run,
    problems=problems,
)
