"""The teacher as a source of signals: for each microbatch of a step, what the loss on the student's last stage needs.

Two placements behind one interface (signals, target, release; states, where losses inside the student want some). ColocatedTeacher
runs on the student's ranks, in the student's layout. RemoteTeacher is the student's view of a teacher on ranks of its own, where
serve() runs, or of what one left on disk; stream.py and cache.py carry the signals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minitron_mp.distillation.hidden_states import HiddenStateCapture, LayerPairs
from minitron_mp.distillation.stream_end import StreamEnd
from minitron_mp.distillation.stream_layout import Grid, StreamShape, splits_sequence
from minitron_mp.distributed.schedule import Batch, run_schedule
from minitron_mp.distributed.world import World
from minitron_mp.losses.fused import float32_logits
from minitron_mp.losses.top_k import pack_top_k, top_k_of
from minitron_mp.models.build import logits, output_weight


def serve_signals(
    chunks: list[Any],
    world: World,
    shape: StreamShape,
    teacher: Grid,
    sender: Any,
    batch_of: Callable[[int], Batch],
    ids: Sequence[int],
    *,
    group: int,
    vocab_size: int,
    top_k: int = 0,
    temperature: float = 1.0,
    pairs: LayerPairs | None = None,
    progress: Callable[[int], None] = lambda count: None,
    ending: StreamEnd | None = None,
) -> None:
    """Run the teacher over its replica's share of the ids and send what it makes; reached by all ranks of the teacher.

    sender: stream.Sender, stream.Senders or cache.Writer, on the last stage. batch_of(id): the microbatch of an id, whole. group:
    microbatches that may go through the pipeline together. pairs: what is sent has the states behind the hidden states. Runs ahead
    of the student as far as the sender has room, over optimizer steps as well: the teacher is frozen and the data known. ending: asked
    before each group whether the ids end early. Returns when everything is consumed.
    """
    pack = partial(
        signal_payload, chunks[-1], shape, world, vocab_size=vocab_size, top_k=top_k, temperature=temperature
    )
    capture = pairs and HiddenStateCapture(
        chunks,
        world,
        pairs.routes(world.parallel, {world.parallel.pp - 1: [*range(len(pairs.settings.layers) + 1)]}),
        pairs.teacher.num_layers,
    )
    block, limit = (
        min(group, world.parallel.pp) * teacher.dp,
        None,
    )  # enough to fill the pipeline of each replica
    for place in range(0, len(ids), block):
        if ending is not None and limit is None:
            limit = ending.limit(ids[place], world.preemption)
        part = [
            id
            for id in ids[place : place + block]
            if id % teacher.dp == world.groups.dp.rank() and (limit is None or id < limit)
        ]
        if not part:
            continue
        if sender is not None:
            sender.make_room(len(part))
        batches = [batch_of(id) for id in part]
        signals = run_schedule(chunks, batches, world, lambda hidden, _: hidden if capture else pack(hidden))
        if capture:
            states = capture.take(batches)
            signals = [pack(torch.cat([hidden, *own], -1)) for hidden, own in zip(signals, states)]
        if sender is not None:
            for id, signal in zip(part, signals):
                sender.send(id, signal)
        progress(len(part))
    if sender is not None:
        if limit is not None and limit <= ids[-1]:
            sender.end(limit, ids[-1] + 1)
        sender.finish()


def signal_payload(
    model: Any,
    shape: StreamShape,
    world: World,
    hidden: Tensor,
    *,
    vocab_size: int,
    top_k: int,
    temperature: float,
) -> Tensor:
    """What a rank of the teacher's last stage sends, [s', b, n'], from hidden [s', b, h]."""
    if shape.payload == "logits":
        return logits(model, hidden).to(shape.dtype)
    own = hidden
    if shape.payload == "topk":
        # From float32: in logits rounded to bf16 the probabilities would be off by percents.
        tokens, b = shape.sequence_length // world.parallel.cp, hidden.shape[1]
        parts = float32_logits(hidden, output_weight(model), tokens, world.groups.tp)
        own = torch.cat(
            [pack_top_k(top_k_of(z, top_k, vocab_size, world.groups.tp, temperature)) for z in parts]
        ).view(tokens, b, -1)
    tp = world.groups.tp
    if splits_sequence(shape, world.parallel) and not (
        shape.payload == "hidden" and world.parallel.sequence_parallel
    ):
        own = own.chunk(tp.size())[tp.rank()]  # all tensor parallel ranks have all tokens; each sends a part
    return own
