"""Teacher side of a stream: run a frozen teacher over microbatches and send its signals.

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
    """Destination of the signals: stream.Sender, stream.Senders, or cache.Writer."""

    def make_room(self, count: int = 1) -> None:
        """Wait until `count` more microbatches may be sent."""

    def send(self, id: int, signal: Tensor, computed: torch.cuda.Event | None = None) -> None:
        """Send this rank's part [s', b, n'] of a microbatch.

        computed: event after the computation of the signal. Default: all issued work.
        """

    def end(self, first: int, last: int) -> None:
        """Announce that microbatches [first, last) are not sent."""

    def finish(self) -> None:
        """Wait until all signals are consumed or written."""


@dataclass(frozen=True)
class ServedTeacher:
    """A frozen teacher, and the settings of its signals.

    window: number of microbatches that may be in the pipeline together.
    top_k, temperature: settings of the payload "topk".
    pairs: pairs whose hidden states are sent after the output of the final norm.
    stream_end: early end of the stream. The teacher checks it before each block of microbatches.
    """

    model: ShardedModel
    shape: StreamShape
    window: int
    top_k: int = 0
    temperature: float = 1.0
    pairs: LayerPairs | None = None
    stream_end: StreamEnd | None = None

    def capture(self) -> HiddenStateCapture | None:
        """Return hooks that send states of all pairs to the last stage, or None without pairs."""
        if self.pairs is None:
            return None
        world = self.model.world
        num_blocks = len(self.pairs.settings.layers) + 1
        routes = self.pairs.routes(world.parallel, {world.parallel.pp - 1: list(range(num_blocks))})
        return HiddenStateCapture(self.model.chunks, world, routes, self.pairs.teacher.num_layers)

    def payload(self, hidden: Tensor) -> Tensor:
        """Return the signal [s', b, n'] of a rank of the last stage for hidden [s', b, h]."""
        world, shape = self.model.world, self.shape
        tp = world.groups.tp
        if shape.payload == "logits":
            return logits(self.model.last_chunk, hidden).to(shape.dtype)
        payload = hidden
        if shape.payload == "topk":
            # float32 logits are needed, because bf16 logits change probabilities by some percent.
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
    """Run the teacher over this replica's microbatches and send the signals.

    Reached by all ranks of the teacher. It returns when all signals are consumed.
    sender: on the last stage; None on other stages.
    batch_of(id): returns a microbatch with complete sequences.
    ids: numbers of the microbatches of all replicas, ascending.

    The teacher runs ahead of the student until the sender's window is full, also across optimizer
    steps, because its weights are frozen and the data does not depend on the student.
    """
    world = teacher.model.world
    dp = world.groups.dp
    capture = teacher.capture()
    block_size = min(teacher.window, world.parallel.pp) * dp.size()  # fills each replica's pipeline
    limit: int | None = None
    outbox = _Outbox(sender, teacher.window, world.device)
    for start in range(0, len(ids), block_size):
        if teacher.stream_end is not None and limit is None:
            limit = teacher.stream_end.limit(ids[start], world.preemption)
        block = ids[start : start + block_size]
        served = [id for id in block if id % dp.size() == dp.rank() and (limit is None or id < limit)]
        if not served:
            continue
        outbox.make_room(len(served))
        signals = _signals(teacher, capture, [batch_of(id) for id in served])
        outbox.add(served, signals)
        progress(len(served))
    outbox.send()
    if sender is not None:
        if limit is not None and limit <= ids[-1]:
            sender.end(limit, ids[-1] + 1)
        sender.finish()


class _Outbox:
    """Signals whose forward pass is issued, but which are not sent yet.

    The host waits for a signal before it sends it. So it first issues the next forward pass, and the
    GPU does not idle meanwhile. The teacher is ahead of its sends by one block of microbatches, if
    the window has room for three.
    """

    def __init__(self, sender: SignalSender | None, window: int, device: torch.device):
        self.sender, self.window, self.device = sender, window, device
        self.signals: list[tuple[int, Tensor]] = []
        self.computed: torch.cuda.Event | None = None

    def make_room(self, count: int) -> None:
        """Wait until the window has room for `count` more microbatches beside those that wait here.

        Students consume all sent microbatches without those that wait here, so the wait ends.
        """
        # The third block is the one that the student consumes.
        if 2 * len(self.signals) + count > self.window:
            self.send()
        if self.sender is not None:
            self.sender.make_room(len(self.signals) + count)

    def add(self, ids: Sequence[int], signals: Sequence[Tensor]) -> None:
        """Send the signals of the last block, and keep those of this one."""
        event = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
        self.send()
        if self.sender is not None:
            self.signals = list(zip(ids, signals, strict=True))
            self.computed = event

    def send(self) -> None:
        """Send the signals that wait here."""
        if self.sender is not None:
            for id, signal in self.signals:
                self.sender.send(id, signal, self.computed)
        self.signals = []


def _signals(
    teacher: ServedTeacher, capture: HiddenStateCapture | None, batches: list[Batch]
) -> list[Tensor]:
    """Return the payload of each microbatch on the last stage, [] on other stages."""
    chunks, world = teacher.model.chunks, teacher.model.world
    if capture is None:
        return run_schedule(chunks, batches, world, lambda hidden, _: teacher.payload(hidden))
    hidden = run_schedule(chunks, batches, world, lambda hidden, _: hidden)
    states = capture.take(batches)
    return [
        teacher.payload(torch.cat([output, *batch_states], -1))
        for output, batch_states in zip(hidden, states)
    ]
