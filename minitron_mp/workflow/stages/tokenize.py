"""The stage data: it tokenizes text into Megatron indexed datasets."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_mp.workflow.settings import text_files, text_settings
from minitron_mp.workflow.stage import Stage
from minitron_mp.workflow.stage_files import TOKENIZER, StopRequested, tokenizer_path

if TYPE_CHECKING:
    from minitron_mp.data.corpus import CorpusText
    from minitron_mp.data.shards import ShardStore, Share
    from minitron_mp.data.tokenize import WrittenText
    from minitron_mp.workflow.stage_files import StageFiles


def run(files: StageFiles) -> None:
    """Write the calibration, training and held-out parts of the text."""
    tokenize_text(files, held_out=False)


def run_share(files: StageFiles, share: Share) -> None:
    """Make a share of the shards of the text."""
    tokenize_share(files, share, held_out=False)


def tokenize_text(files: StageFiles, *, held_out: bool) -> None:
    """Write the three parts of the text, or with held_out the texts of data.held_out.

    A large text is written shard by shard. Finished shards of an earlier run are used.
    """
    from minitron_mp.artifacts.manifest import writing_artifact
    from minitron_mp.console import say
    from minitron_mp.data.corpus import counted_tokens, finish_corpus
    from minitron_mp.data.unused import load_unused
    from minitron_mp.distributed.launcher import environment_variable
    from minitron_mp.errors import InputError

    recipe = files.recipe
    stage = files.manifest.stage
    text = _open_text(files, held_out)
    store = _store(files, text)
    try:
        # The launch scripts disable the tokenizer's threads, because they break processes that are
        # forked later. No process is forked here.
        with (
            environment_variable("TOKENIZERS_PARALLELISM", "true"),
            writing_artifact(files.output, files.manifest) as folder,
        ):
            written = _write(files, text, store, folder)
            _check_unchanged(files, text, store, held_out)
            tokens = finish_corpus(text, written, folder)
            if recipe.data.tokenizer and not held_out:
                _copy_tokenizer(tokenizer_path(recipe, files.paths), folder / TOKENIZER)
    except OSError as error:
        raise InputError(f"{files.output} cannot be written: {error}; set another output") from error
    store.discard()
    say(f"{stage}: " + ", ".join(f"{part} {count:,} tokens" for part, count in tokens.items()))
    counted = counted_tokens(files.output, tokens)
    if counted:
        rows = [f"{part} {count:,} ({count / tokens[part]:.0%})" for part, count in counted.items()]
        say(f"{stage}: tokens that count in the loss: {', '.join(rows)}")
    not_used = load_unused(files.output).summary()
    if not_used:
        say(f"{stage}: text that is not used, or not as it is: {not_used}")


def tokenize_share(files: StageFiles, share: Share, *, held_out: bool) -> None:
    """Make the missing shards of a share. The manifest of the files does not need the text.

    Several processes may do this at the same time, on several nodes.
    """
    from minitron_mp.console import say
    from minitron_mp.data.file_hashes import FileHashes
    from minitron_mp.data.shards import divide
    from minitron_mp.data.workers import make_shards

    text = _open_text(files, held_out)
    store = _store(files, text)
    shards = divide(text.files)
    own = share.of(shards)
    hashes = FileHashes(files.recipe.run.root)
    missing = [shard for shard in own if not store.is_done(shard, hashes)]
    stage = files.manifest.stage
    done = len(own) - len(missing)
    say(f"{stage}: share {share} has {len(own)} of {len(shards)} shards, of which {done} are done")
    make_shards(store, missing, files.recipe.data.workers, _Progress(files, len(missing)))
    say(f"{stage}: share {share} is done; `minitron-mp {stage}` puts all shards together")


def _open_text(files: StageFiles, held_out: bool) -> CorpusText:
    from minitron_mp.data.corpus import open_text_of

    recipe = files.recipe
    output = recipe.run.root
    return open_text_of(recipe.data, files.tokenizer(), recipe.seed, held_out=held_out, output=output)


def _store(files: StageFiles, text: CorpusText) -> ShardStore:
    from minitron_mp.data.file_hashes import SHARDS
    from minitron_mp.data.shards import ShardStore

    inputs = files.manifest.inputs
    return ShardStore(
        files.recipe.root / SHARDS / files.output.name,
        text.job,
        tokenizer_hash=f"{inputs['import']} {inputs.get('tokenizer', '')}",
    )


def _write(files: StageFiles, text: CorpusText, store: ShardStore, folder: Path) -> WrittenText:
    """Write the datasets of the parts into a folder, by way of shards if the text has several."""
    from minitron_mp.console import say
    from minitron_mp.data.file_hashes import FileHashes
    from minitron_mp.data.shards import divide
    from minitron_mp.data.tokenize import write_parts
    from minitron_mp.data.workers import make_shards

    shards = divide(text.files)
    if len(shards) < 2 and not store.folder.exists():
        return write_parts(text.files, text.job, folder, _Progress(files, 1))
    hashes = FileHashes(files.recipe.run.root)
    missing = [shard for shard in shards if not store.is_done(shard, hashes)]
    stage = files.manifest.stage
    say(f"{stage}: {len(shards) - len(missing)} of {len(shards)} shards are done")
    make_shards(store, missing, files.recipe.data.workers, _Progress(files, len(missing)))
    say(f"{stage}: putting {len(shards)} shards together")
    return store.put_together(shards, folder)


def _check_unchanged(files: StageFiles, text: CorpusText, store: ShardStore, held_out: bool) -> None:
    """Raise InputError if the text or the shards are not those of the artifact's manifest any more."""
    from minitron_mp.data.file_hashes import FileHashes
    from minitron_mp.data.shards import divide
    from minitron_mp.errors import InputError
    from minitron_mp.models.model_folder import shortened

    fingerprint = text_files(files.recipe, held_out=held_out)["text"].fingerprint()
    if fingerprint != files.manifest.inputs["text"]:
        raise InputError(
            "files of the text were changed, added or removed while it was tokenized; run "
            f"`minitron-mp {files.manifest.stage}` again when the text is complete. Shards whose files are "
            "the same are kept"
        )
    hashes = FileHashes(files.recipe.run.root)
    shards = divide(text.files) if store.folder.exists() else []
    replaced = [shard.name for shard in shards if not store.is_done(shard, hashes)]
    if replaced:
        raise InputError(
            f"another process has replaced shards of {store.folder} ({', '.join(shortened(replaced))}); end "
            f"jobs with --shard and other settings, then run `minitron-mp {files.manifest.stage}` again"
        )


class _Progress:
    """Prints the number of finished documents, and stops the stage early if that is requested."""

    def __init__(self, files: StageFiles, num_shards: int):
        self.files = files
        self.num_shards = num_shards
        self.num_documents = 0
        self.started = time.monotonic()
        self.last_line = self.started

    def __call__(self, documents: int) -> None:
        from minitron_mp.console import LINE_INTERVAL_S, say

        self.num_documents += documents
        now = time.monotonic()
        if now - self.last_line >= LINE_INTERVAL_S:
            self.last_line = now
            speed = self.num_documents / (now - self.started)
            say(f"{self.files.manifest.stage}: {self.num_documents:,} documents, {speed:,.0f} documents/s")
        reason = self.files.stop_request()
        if reason:
            raise StopRequested(reason)


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
    num_samples = {"train": 0, "valid": recipe.evaluate.num_samples}
    if recipe.prunes:
        num_samples = {"calibration": max(calibration), **num_samples}
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
    shared="if equal",
    settings=lambda recipe: {
        "valid_fraction": recipe.data.valid_fraction,
        **({} if recipe.data.valid_tokens is None else {"valid_tokens": recipe.data.valid_tokens}),
        "seed": recipe.seed,
        **text_settings(recipe),
    },
    sources=lambda recipe: text_files(recipe, held_out=False),
    run_on_one_rank=run,
    run_share=run_share,
    problems=problems,
)
