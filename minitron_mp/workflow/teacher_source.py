"""The teacher of a distillation: on the student's ranks, on other ranks, or as signals on disk.

This module connects a recipe and its artifacts to the teachers, streams and caches in distillation/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from minitron_mp.console import say
from minitron_mp.data.batches import microbatches
from minitron_mp.data.positions import sample_positions
from minitron_mp.data.prefetch import Prefetch
from minitron_mp.distillation.cache import Reader
from minitron_mp.distillation.layer_pairs import LayerPairs
from minitron_mp.distillation.receiver import Receiver
from minitron_mp.distillation.serve import ServedTeacher, SignalSender, serve_signals
from minitron_mp.distillation.stream import Sender, Senders
from minitron_mp.distillation.stream_end import StreamEnd
from minitron_mp.distillation.stream_layout import Grid
from minitron_mp.distillation.stream_pairs import connect_pairs
from minitron_mp.distillation.teacher import ColocatedTeacher, RemoteTeacher
from minitron_mp.distillation.teacher_head import load_head
from minitron_mp.distributed.batch import Batch
from minitron_mp.models.axes import HIDDEN
from minitron_mp.models.sharded_model import DTYPES
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.workflow.context import StageContext, training_samples
from minitron_mp.workflow.fp8_teacher import log_fp8_teacher_kl
from minitron_mp.workflow.held_out_signals import receive_held_out, serve_held_out
from minitron_mp.workflow.teacher_stream import (
    handshake,
    microbatch_ids,
    role_link,
    signal_shape,
    stream_end,
)


def open_teacher(context: StageContext, first_step: int) -> ColocatedTeacher | RemoteTeacher:
    """Return the teacher for the training of the student, which starts at `first_step`."""
    teacher = context.recipe.teacher
    pairs = _layer_pairs(context)
    if teacher.placement == "colocated":
        return context.teacher(pairs=pairs, fp8=teacher.fp8)
    if teacher.placement == "cached":
        return _cached_teacher(context, first_step)
    return _streamed_teacher(context, first_step, pairs)


def _cached_teacher(context: StageContext, first_step: int) -> RemoteTeacher:
    """Return a teacher that reads the artifact of the stage cache, on the last pipeline stage."""
    recipe, world = context.recipe, context.world
    groups = world.groups
    reader = None
    if world.is_last_stage:
        student = Grid("student", recipe.parallel, groups.dp.size())
        coordinates = (groups.dp.rank(), groups.cp.rank(), groups.tp.rank())
        ids = _local_ids(context, first_step)
        reader = Reader(
            context.paths["cache"], signal_shape(context), student, coordinates, ids, world.device
        )
    return RemoteTeacher(reader, recipe.teacher.payload, _head(context), world)


def _streamed_teacher(context: StageContext, first_step: int, pairs: LayerPairs | None) -> RemoteTeacher:
    """Return a teacher that receives from the ranks of the role teacher."""
    recipe, world = context.recipe, context.world
    link = role_link(context)
    handshake(context, link, first_step)
    copies = "1 copy" if link.teacher.dp == 1 else f"{link.teacher.dp} copies"
    say(f"distill: {copies} of the teacher, from job rank {link.teacher.first} on")
    blocks = pairs.blocks(recipe.parallel) if pairs else {recipe.parallel.pp - 1: [0]}
    connect_pairs(link, blocks)
    stage_link = link.to_stages(blocks).get(world.groups.pp.rank())
    receiver, head = None, _head(context)
    held_out = receive_held_out(context, link, head)
    if stage_link is not None:
        ids = _local_ids(context, first_step)
        receiver = Receiver(stage_link, link.students[0], ids, world.device)
    return RemoteTeacher(
        receiver, recipe.teacher.payload, head, world, pairs, stream_end(context, link), held_out
    )


def _local_ids(context: StageContext, first_step: int) -> list[int]:
    """Return the ids of this data parallel rank's microbatches."""
    dp = context.world.groups.dp
    return [id for id in microbatch_ids(context.recipe, first_step) if id % dp.size() == dp.rank()]


def _head(context: StageContext) -> Tensor | None:
    """Return the weight of the teacher's output layer; None if the payload is not hidden states.

    Called on all ranks.
    """
    recipe = context.recipe
    if recipe.teacher.payload != "hidden":
        return None
    stage = recipe.distillation_teacher
    return load_head(
        context.arch(stage), context.paths[stage], context.world, DTYPES[recipe.teacher_precision]
    )


def _layer_pairs(context: StageContext) -> LayerPairs | None:
    """Return the pairs of hidden states to match; None without distill.states.

    For a student that is pruned from this teacher they include the kept channels.
    """
    recipe = context.recipe
    if recipe.distill.states is None:
        return None
    channels = None
    if recipe.teacher.model is None:
        channels = tuple(PrunePlan.load(context.paths["plan"]).units(HIDDEN).tolist())
    return LayerPairs(
        recipe.distill.states,
        context.arch("prune"),
        context.arch(recipe.distillation_teacher),
        channels,
    )


def serve_students(context: StageContext) -> None:
    """Stream the teacher's signals for all microbatches that the students still need.

    Called on all ranks of the role teacher.
    """
    link = role_link(context)
    start = handshake(context, link, 0)
    context = replace(context, manifest=context.manifest.model_copy(update={"changes": start.changes}))
    pairs = _layer_pairs(context)
    blocks = pairs.blocks(context.recipe.parallel) if pairs else {}
    connect_pairs(link, blocks)
    sender: SignalSender | None = None
    if context.world.is_last_stage:
        sender = Senders(link.to_stages(blocks), blocks, link.shape.width) if blocks else Sender(link)
    teacher = load_served_teacher(context, link.window, pairs, stream_end(context, link))
    serve_held_out(context, teacher, link)
    log_fp8_teacher_kl(context, teacher.model)
    serve(context, teacher, sender, start.step)


def load_served_teacher(
    context: StageContext,
    window: int,
    pairs: LayerPairs | None = None,
    stream_end: StreamEnd | None = None,
) -> ServedTeacher:
    """Load the teacher that serves signals. window: microbatches in the pipeline at once."""
    recipe = context.recipe
    return ServedTeacher(
        context.teacher_model(fp8=recipe.teacher.fp8).freeze(),
        signal_shape(context),
        window,
        top_k=recipe.teacher.top_k,
        temperature=recipe.distill.temperature,
        pairs=pairs,
        stream_end=stream_end,
    )


def serve(
    context: StageContext,
    teacher: ServedTeacher,
    sender: SignalSender | None,
    first_step: int,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Run the teacher over all microbatches of distill from `first_step` on, and send its signals.

    Called on all ranks that hold the teacher.
    """
    recipe = context.recipe
    settings = recipe.distill
    positions = sample_positions(settings, context.manifest.changes)
    samples = training_samples(context, settings, positions)
    per_step = settings.global_batch_size // settings.micro_batch_size

    def batch_of(id: int) -> Batch:
        step = id // per_step
        (batch,) = microbatches(
            positions.from_step(samples, step),
            step,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.micro_batch_size,
            dp_rank=id % per_step,
            dp_size=per_step,
        )
        return batch

    ids, num_replicas = microbatch_ids(recipe, first_step), teacher.model.world.groups.dp.size()
    with Prefetch(batch_of, ids.stop, stride=num_replicas, depth=teacher.window) as batch_ahead:
        serve_signals(teacher, sender, batch_ahead, ids, progress=progress)
