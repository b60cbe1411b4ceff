"""The stage score: it measures the importance of every layer, neuron, head and channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from minitron_mp.workflow.settings import blend_settings, run_settings
from minitron_mp.workflow.stage import Stage, prunes, pruning_base

if TYPE_CHECKING:
    from minitron_mp.distributed.batch import Batch
    from minitron_mp.workflow.context import StageContext


def score_teacher(context: StageContext) -> None:
    """Score all axes in one forward pass over the calibration text."""
    from minitron_mp.console import Tracker
    from minitron_mp.distributed.sync import on_rank_0
    from minitron_mp.pruning.importance import score

    config = context.recipe.score
    model = context.build(context.recipe.pruning_base).eval()
    _, groups = context.groups("calibration", config.num_samples, config.micro_batch_size, exact=True)

    def tracked() -> Iterator[list[Batch]]:
        with Tracker("score", config.num_samples, "samples") as tracker:
            for batches in groups:
                yield batches
                tracker.advance(len(batches) * config.micro_batch_size * context.world.groups.dp.size())

    scores = score(model, tracked(), config)
    on_rank_0(lambda: scores.save(context.output, context.manifest.model_copy(update={"arch": model.arch})))


SCORE = Stage(
    name="score",
    help="Score every layer, neuron, head and channel by forward passes over calibration text.",
    artifact="importance.safetensors",
    inputs=(pruning_base, "data"),
    settings=lambda recipe: {
        **recipe.score.result_settings(),
        **run_settings(recipe),
        **blend_settings(recipe, "calibration"),
    },
    when=prunes,
    run=score_teacher,
)
