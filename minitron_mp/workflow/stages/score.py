"""What each stage does once its inputs are there: read artefacts, compute, write one. pipeline.py decides whether and when.

Every function is reached by all ranks of the world and leaves its artefact whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from minitron_mp.console import Tracker
from minitron_mp.distributed.schedule import Batch
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.pruning.importance import score
from minitron_mp.workflow.context import StageContext


def score_teacher(job: StageContext) -> None:
    """Importance of all axes in one forward pass over the calibration text."""
    settings = job.recipe.score
    model = job.sharded_model(job.recipe.base)
    _, groups = job.groups("calibration", settings.num_samples, settings.micro_batch_size, exact=True)
    for chunk in model.chunks:
        chunk.eval()

    def tracked() -> Iterator[Sequence[Batch]]:
        with Tracker("score", settings.num_samples, "samples") as tracker:
            for batches in groups:
                yield batches
                tracker.advance(len(batches) * settings.micro_batch_size * job.world.groups.dp.size())

    result = score(model, tracked(), settings)
    on_rank_0(lambda: result.save(job.output, job.manifest.model_copy(update={"arch": model.arch})))
