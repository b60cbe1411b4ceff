"""The stage score: the importance of every layer, neuron, head and channel, by forward passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron_mp.workflow.settings import run_settings
from minitron_mp.workflow.stage import Stage, pruning_base

if TYPE_CHECKING:
    from minitron_mp.workflow.context import StageContext


def score_teacher(context: StageContext) -> None:
    """Score all axes in one forward pass over the calibration text."""
    from minitron_mp.console import Tracker
    from minitron_mp.distributed.schedule import run_schedule
    from minitron_mp.distributed.sync import on_rank_0
    from minitron_mp.pruning.importance import score

    settings, sequence_length = context.recipe.score, context.recipe.data.sequence_length
    arch, chunks = context.arch(context.recipe.pruning_base), context.build(context.recipe.pruning_base)
    _, groups = context.groups("calibration", settings.num_samples, settings.micro_batch_size, exact=True)
    for chunk in chunks:
        chunk.eval()

    def forward() -> None:
        with Tracker("score", settings.num_samples, "samples") as tracker:
            for batches in groups:
                run_schedule(chunks, batches, context.world, None)
                tracker.advance(len(batches) * settings.micro_batch_size * context.world.groups.dp.size())

    scores = score(chunks, arch, settings, context.world, sequence_length, forward)
    on_rank_0(lambda: scores.save(context.output, context.manifest.model_copy(update={"arch": arch})))


SCORE = Stage(
    name="score",
    help="Score every layer, neuron, head and channel by forward passes over calibration text.",
    artifact="importance.safetensors",
    inputs=(pruning_base, "data"),
    settings=lambda recipe: {**recipe.score.result_settings(), **run_settings(recipe)},
    run=score_teacher,
)
