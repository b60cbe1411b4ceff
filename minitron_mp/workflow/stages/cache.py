"""The stage cache: it writes the teacher's signals for all microbatches of distill to disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron_mp.config.recipe import Recipe
from minitron_mp.workflow.settings import blend_settings, fp8_teacher, run_settings
from minitron_mp.workflow.stage import Stage, distillation_teacher

if TYPE_CHECKING:
    from minitron_mp.workflow.context import StageContext


def cache_teacher(context: StageContext) -> None:
    """Run the teacher over all microbatches, on all ranks in the recipe's layout.

    The ranks of the last pipeline stage write the signals.
    """
    import shutil

    import torch

    from minitron_mp.artifacts.checkpoint import check_room
    from minitron_mp.artifacts.files import aside_path
    from minitron_mp.artifacts.manifest import commit_artifact, prepare_artifact
    from minitron_mp.console import Tracker
    from minitron_mp.distillation.cache import Writer, write_index
    from minitron_mp.distillation.stream_layout import Grid
    from minitron_mp.distributed.sync import on_rank_0, raise_on_all_ranks
    from minitron_mp.workflow.fp8_teacher import log_fp8_teacher_kl
    from minitron_mp.workflow.teacher_source import load_served_teacher, serve
    from minitron_mp.workflow.teacher_stream import microbatch_ids, signal_shape

    recipe, world = context.recipe, context.world
    groups = world.groups
    shape = signal_shape(context)
    teacher = Grid("teacher", recipe.parallel, groups.dp.size())
    num_microbatches = len(microbatch_ids(recipe, 0))
    microbatch_bytes = torch.Size(shape.local(recipe.parallel)).numel() * shape.dtype.itemsize
    on_rank_0(lambda: shutil.rmtree(aside_path(context.output), ignore_errors=True))
    num_bytes = num_microbatches / teacher.dp * microbatch_bytes if world.is_last_stage else 0
    check_room(num_bytes, context.output)
    folder = on_rank_0(lambda: prepare_artifact(context.output))
    writer = None
    if world.is_last_stage:
        writer = Writer(folder, teacher.last_stage(groups.dp.rank(), groups.cp.rank(), groups.tp.rank()))
    failure: Exception | None = None
    with Tracker("cache", num_microbatches, "microbatches") as tracker:
        try:
            served = load_served_teacher(context, window=recipe.parallel.pp)
            log_fp8_teacher_kl(context, served.model)
            serve(context, served, writer, 0, progress=lambda count: tracker.advance(count * teacher.dp))
        except Exception as error:
            failure = error
    raise_on_all_ranks(failure)

    def finish() -> None:
        write_index(folder, shape, teacher, 0, num_microbatches)
        commit_artifact(context.output, context.manifest)

    on_rank_0(finish)


def settings(recipe: Recipe) -> dict[str, object]:
    """Return the microbatches, the teacher's precision and the payload."""
    result = {
        **recipe.distill.model_dump(include={"steps", "global_batch_size", "micro_batch_size"}),
        **run_settings(recipe),
        **blend_settings(recipe, "train"),
        "precision": recipe.teacher_precision,
        "payload": recipe.teacher.payload,
        **fp8_teacher(recipe),
    }
    if recipe.distill.skip_batches:
        result["skip_batches"] = recipe.distill.skip_batches
    if recipe.teacher.payload == "topk":
        result |= {"top_k": recipe.teacher.top_k, "temperature": recipe.distill.temperature}
    return result


CACHE = Stage(
    name="cache",
    help="Write the teacher's signals for all microbatches of distill to disk.",
    artifact="teacher_signals",
    inputs=(distillation_teacher, "data"),
    shared="if equal",
    settings=settings,
    when=lambda recipe: recipe.teacher.placement == "cached",
    requirement="teacher.placement: cached",
    run=cache_teacher,
    disk_bytes=lambda sizes: sizes.teacher_signals,
)
