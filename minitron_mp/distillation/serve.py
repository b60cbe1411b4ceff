"""The teacher's side: run a frozen teacher over microbatches and send what the students need.

s' is s/cp, or s/cp/tp under sequence parallelism  b microbatch  h hidden  n payload width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minitron_mp.distillation.layer_pairs import LayerPairs
from minitron_mp.distillation.state_capture import HiddenStateCapture
from minitron_mp.distillation.stream_end import StreamEnd
from minitron_mp.distillation.stream_layout import StreamShape, splits_sequence
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.schedule import run_schedule
from minitron_mp.losses.fused import float32_logits
from minitron_mp.losses.top_k import pack_top_k, top_k_of
from minitron_mp.models.sharded_model import ShardedModel, logits, output_weight


class SignalSender(Protocol):
    """Where the signals go: stream.Sender, stream.Senders, or cache.Writer."""

    def make_room(self, count: int = 1) -> None:
        """Wait until `count` more microbatches may be sent."""

    def send(self, id: int, signal: Tensor) -> None:
        """Send this rank's part [s', b, n'] of a microbatch."""

    def end(self, first: int, last: int) -> None:
        """Announce that microbatches [first, last) are not sent."""

    def finish(self) -> None:
        """Wait until everything is consumed or written."""


@dataclass(frozen=True)
class ServedTeacher:
    """A frozen teacher, and what it sends for each microbatch.

    window: microbatches that may pass through the pipeline together.
    top_k, temperature: of the payload "topk".
    pairs: the hidden states of these pairs are sent behind the output of the final norm.
    stream_end: read before each block of microbatches, when the stream may end early.
    """

    model: ShardedModel
    shape: StreamShape
    window: int
    top_k: int = 0
    temperature: float = 1.0
    pairs: LayerPairs | None = None
    stream_end: StreamEnd | None = None

    def capture(self) -> HiddenStateCapture | None:
        """Return hooks that bring the states of all pairs to the last stage; None without pairs."""
        if self.pairs is None:
            return None
        world = self.model.world
        num_blocks = len(self.pairs.settings.layers) + 1
        routes = self.pairs.routes(world.parallel, {world.parallel.pp - 1: list(range(num_blocks))})
        return HiddenStateCapture(self.model.chunks, world, routes, self.pairs.teacher.num_layers)

    def payload(self, hidden: Tensor) -> Tensor:
        """Return what a rank of the last stage sends, [s', b, n'], from hidden [s', b, h]."""
        world, shape = self.model.world, self.shape
        tp = world.groups.tp
        if shape.payload == "logits":
            return logits(self.model.last_chunk, hidden).to(shape.dtype)
        payload = hidden
        if shape.payload == "topk":
            # From float32 logits: bf16 logits would change probabilities by percents.
            tokens, b = shape.sequence_length // world.parallel.cp, hidden.shape[1]
            vocab_size, weight = self.model.arch.vocab_size, output_weight(self.model.last_chunk)
            parts = [
                pack_top_k(top_k_of(z, self.top_k, vocab_size, tp, self.temperature))
                for z in float32_logits(hidden, weight, tokens, tp)
            ]
            payload = torch.cat(parts).view(tokens, b, -1)
        is_split = shape.payload == "hidden" and world.parallel.sequence_parallel
        if splits_sequence(shape, world.parallel) and not is_split:
            # All tensor-parallel ranks hold all tokens. Each sends a part of them.
            payload = payload.chunk(tp.size())[tp.rank()]
        return payload


def serve_signals(
    teacher: ServedTeacher,
    sender: SignalSender | None,
    batch_of: Callable[[int], Batch],
    ids: Sequence[int],
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Run the teacher over its replica's share of the microbatches and send the signals.

    Called by all ranks of the teacher. Returns when everything is consumed.
    sender: on the last stage, None elsewhere.
    batch_of(id): a microbatch, whole sequences.
    ids: of the microbatches of all replicas, ascending.

    The teacher runs ahead of the student as far as the sender has room, over optimizer
    steps as well, because its weights are frozen and the data is known.
    """
    world = teacher.model.world
    dp = world.groups.dp
    capture = teacher.capture()
    block_size = min(teacher.window, world.parallel.pp) * dp.size()  # fills each replica's pipeline
    limit: int | None = None
    for start in range(0, len(ids), block_size):
        if teacher.stream_end is not None and limit is None:
            limit = teacher.stream_end.limit(ids[start], world.preemption)
        block = ids[start : start + block_size]
        served = [id for id in block if id % dp.size() == dp.rank() and (limit is None or id < limit)]
        if not served:
            continue
        if sender is not None:
            sender.make_room(len(served))
        signals = _signals(teacher, capture, [batch_of(id) for id in served])
        if sender is not None:
            for id, signal in zip(served, signals):
                sender.send(id, signal)
        progress(len(served))
    if sender is not None:
        if limit is not None and limit <= ids[-1]:
            sender.end(limit, ids[-1] + 1)
        sender.finish()


def _signals(
    teacher: ServedTeacher, capture: HiddenStateCapture | None, batches: list[Batch]
) -> list[Tensor]:
    """Return the payload of each microbatch on the last stage, [] elsewhere."""
    chunks, world = teacher.model.chunks, teacher.model.world
    if capture is None:
        return run_schedule(chunks, batches, world, lambda hidden, _: teacher.payload(hidden))
    hidden = run_schedule(chunks, batches, world, lambda hidden, _: hidden)
    states = capture.take(batches)
    return [teacher.payload(torch.cat([output, *of_batch], -1)) for output, of_batch in zip(hidden, states)]
