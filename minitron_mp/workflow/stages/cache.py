"""Where the teacher's signals of a distillation come from: the teacher here, on other ranks, or what a teacher left on disk.

Recipe and artefacts -> the links, ends and ids that teacher.py, stream.py and cache.py work with.
"""

from __future__ import annotations

import shutil

import torch

from minitron_mp.artifacts.checkpoint import check_room
from minitron_mp.artifacts.files import aside_path
from minitron_mp.artifacts.manifest import commit_artifact, prepare_artifact
from minitron_mp.console import Tracker
from minitron_mp.distillation.cache import Writer, write_index
from minitron_mp.distillation.stream_layout import Grid
from minitron_mp.distributed.sync import on_rank_0, raise_on_all_ranks
from minitron_mp.workflow.context import StageContext
from minitron_mp.workflow.teacher_source import ids, serve, signal_shape


def cache_teacher(job: StageContext) -> None:
    """The teacher over all microbatches of distill, on all ranks in the recipe's layout, to disk."""
    recipe, world, shape = job.recipe, job.world, signal_shape(job)
    teacher = Grid("teacher", recipe.parallel, world.groups.dp.size())
    g, is_last = world.groups, world.is_last_stage
    share = (
        len(ids(recipe, 0))
        / teacher.dp
        * torch.Size(shape.local(recipe.parallel)).numel()
        * shape.dtype.itemsize
    )
    on_rank_0(lambda: shutil.rmtree(aside_path(job.output), ignore_errors=True))
    check_room(share if is_last else 0, job.output)
    folder = on_rank_0(lambda: prepare_artifact(job.output))
    writer = Writer(folder, teacher.last_stage(g.dp.rank(), g.cp.rank(), g.tp.rank())) if is_last else None
    failure: Exception | None = None
    with Tracker("cache", len(ids(recipe, 0)), "microbatches") as tracker:
        try:
            serve(
                job,
                writer,
                0,
                window=recipe.parallel.pp,
                progress=lambda count: tracker.advance(count * teacher.dp),
            )
        except Exception as error:
            failure = error
    raise_on_all_ranks(failure)

    def finish() -> None:
        write_index(folder, shape, teacher, 0, len(ids(recipe, 0)))
        commit_artifact(job.output, job.manifest)

    on_rank_0(finish)
