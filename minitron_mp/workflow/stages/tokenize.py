"""What each stage does once its inputs are there: read artefacts, compute, write one. pipeline.py decides whether and when.

Every function is reached by all ranks of the world and leaves its artefact whole or not at all.
"""

from __future__ import annotations

from minitron_mp.artifacts.manifest import writing_artifact
from minitron_mp.console import say
from minitron_mp.data.corpus import tokenize_corpus
from minitron_mp.data.tokenizer import check_vocabulary
from minitron_mp.distributed.launcher import environment_variable
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.errors import InputError
from minitron_mp.workflow.context import StageContext


def tokenize_text(job: StageContext) -> None:
    """Text -> three Megatron indexed datasets, or those of data.held_out (stage texts); rank 0 works, the others wait."""
    done = 0

    def progress(documents: int) -> None:
        nonlocal done
        if documents - done >= 250:
            done = documents
            say(f"{job.manifest.stage}: {documents} documents")

    def write() -> None:
        tokenizer = job.tokenizer()
        check_vocabulary(tokenizer, job.arch("import").vocab_size)
        try:
            # On many cores; elsewhere the launch scripts forbid it, for the sake of processes that are forked.
            with (
                environment_variable("TOKENIZERS_PARALLELISM", "true"),
                writing_artifact(job.output, job.manifest) as folder,
            ):
                held_out = job.manifest.stage == "texts"
                tokens = tokenize_corpus(
                    job.recipe.data, tokenizer, folder, job.recipe.seed, held_out=held_out, progress=progress
                )
        except OSError as error:
            raise InputError(f"{job.output} cannot be written: {error}") from error
        say(
            f"{job.manifest.stage}: "
            + ", ".join(f"{part} {count:,} tokens" for part, count in tokens.items())
        )

    on_rank_0(write, takes_long=True)
