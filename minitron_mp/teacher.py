"""The teacher as a source of signals: for each microbatch of a step, what the loss on the student's last stage needs.

Two placements behind one interface (signals, target, release; states, where losses inside the student want some). ColocatedTeacher
runs on the student's ranks, in the student's layout. RemoteTeacher is the student's view of a teacher on ranks of its own, where
serve() runs, or of what one left on disk; stream.py and cache.py carry the signals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minitron_mp import checkpoint, losses
from minitron_mp.arch import Arch
from minitron_mp.leaving import Ending
from minitron_mp.losses import TeacherHidden, TeacherLogits, TeacherTopK
from minitron_mp.model import build_model, logits, output_weight
from minitron_mp.parallel import World
from minitron_mp.schedule import Batch, run
from minitron_mp.states import Capture, Pairs
from minitron_mp.stream import Grid, Payload, Shape, splits_sequence


@dataclass(frozen=True)
class Signal:
    """A colocated teacher's, of one microbatch. hidden [s', b, h] on the last stage (s' as schedule.run says), None elsewhere; states: what this
    stage wants, [s', b, h] each."""

    hidden: Tensor | None
    states: list[Tensor]


class ColocatedTeacher:
    """A frozen teacher on the student's ranks, in the student's layout.

    Its forward-only schedule runs the microbatches of a step first and leaves, on the last stage, the hidden states after the
    final norm: 2h bytes a token in bf16, and as much for each pair of states on the stage that wants it. The loss applies the
    teacher's head to a chunk of tokens at a time.
    """

    def __init__(
        self,
        arch: Arch,
        folder: Path,
        world: World,
        *,
        pairs: Pairs | None = None,
        prefix: str = "",
        **build: Any,
    ):
        """build: what build_model() takes."""
        self.world, self.pairs = world, pairs
        self.chunks = frozen_model(arch, folder, world, prefix=prefix, **build)
        self.capture = pairs and Capture(
            self.chunks, world, pairs.routes(world.parallel, pairs.blocks(world.parallel)), arch.num_layers
        )

    def signals(self, batches: Sequence[Batch], step: int) -> list[Signal]:
        """One entry a microbatch, on all ranks."""
        if self.capture:
            self.capture.forget()  # of passes for something else: tell_drift() measures these chunks before the first step
        hidden = run(self.chunks, batches, self.world, lambda hidden, _: hidden) or [None] * len(batches)
        states = self.capture.take(batches) if self.capture else [[] for _ in batches]
        return list(map(Signal, hidden, states))

    def target(self, signal: Signal) -> losses.Teacher:
        """What the loss takes, on the last stage."""
        assert signal.hidden is not None
        return TeacherHidden(signal.hidden, output_weight(self.chunks[-1]))

    def states(self, signal: Signal) -> list[Tensor]:
        """The teacher's states [s', b, h_t] that this stage wants, in order of the pairs; called before each chunk's forward pass."""
        return signal.states

    def release(self, signal: Any) -> None:
        """The loss is done with it."""

    def close(self) -> None:
        """The run is done with the teacher."""


class RemoteTeacher:
    """A teacher elsewhere: receiver is a stream.Receiver or cache.Reader, on the last stage, and on those that want states. head [v/tp, h_t]: the
    teacher's, for hidden states."""

    def __init__(
        self,
        receiver: Any,
        payload: Payload,
        head: Tensor | None,
        world: World,
        pairs: Pairs | None = None,
        ending: Ending | None = None,
    ):
        self.receiver, self.payload, self.head, self.world, self.pairs = receiver, payload, head, world, pairs
        self.ending = ending
        """Of a stream that may end early."""
        self.held: dict[int, Tensor] = {}
        """With states: signals that a chunk of this stage has still to use."""
        self.uses: Counter[int] = Counter()

    def signals(self, batches: Sequence[Batch], step: int) -> list[Any]:
        """The ids of this data parallel rank's microbatches."""
        dp = self.world.groups.dp
        return [(step * len(batches) + i) * dp.size() + dp.rank() for i in range(len(batches))]

    def target(self, signal: int) -> losses.Teacher:
        assert self.receiver is not None, "signals arrive on the last stage"
        received = (
            self.held.pop(signal)[..., : self.pairs.teacher.hidden_size]
            if self.pairs
            else self.receiver.get(signal)
        )
        if self.payload == "hidden":
            assert self.head is not None
            return TeacherHidden(received, self.head)
        return TeacherLogits(received) if self.payload == "logits" else unpack_top_k(received)

    def states(self, signal: int) -> list[Tensor]:
        """As ColocatedTeacher.states; under tensor parallelism the rows may be this rank's part of what the student has whole (stream.py).

        Taken over, and credit given, before the first chunk runs: interleaved stages run that on several microbatches before the
        loss sees the first of them, which would deadlock with a small window.
        """
        if self.receiver is None or self.pairs is None:
            return []
        if signal not in self.held:
            self.held[signal] = self.receiver.get(signal)
            self.receiver.release(signal)
        blocks = self.held[signal].split(self.pairs.teacher.hidden_size, -1)
        self.uses[signal] += 1
        if self.uses[signal] == (self.world.parallel.vpp or 1):
            del self.uses[signal]
            if not self.world.is_last_stage:
                del self.held[signal]
        return list(blocks[self.world.is_last_stage :])  # the last stage's first block is for the logits

    def release(self, signal: int) -> None:
        assert self.receiver is not None
        if not self.pairs:
            self.receiver.release(signal)

    def traffic(self) -> tuple[float, int] | None:
        """(seconds for which this rank waited for signals, bytes received) so far; None where no stream comes."""
        link = getattr(self.receiver, "link", None)
        return link and (link.wait_s, link.bytes_moved)

    def close(self) -> None:
        if self.receiver is not None:
            self.receiver.close()


def with_signals(teacher: Any, batches: Sequence[Batch], step: int = 0) -> list[Batch]:
    """The microbatches with the teacher's signal of each under "teacher"; without a teacher, as they are."""
    if teacher is None:
        return list(batches)
    return [{**batch, "teacher": signal} for batch, signal in zip(batches, teacher.signals(batches, step))]


def frozen_model(arch: Arch, folder: Path, world: World, *, prefix: str = "", **build: Any) -> list[Any]:
    """The model of a checkpoint, for forward passes; prefix: of its keys there; build: what build_model() takes."""
    with torch.no_grad():  # or weights in FP8 would get a transposed copy for the backward pass
        chunks = build_model(arch, world, **build)
    checkpoint.load_model(chunks, folder, world, prefix)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    return chunks


def load_head(arch: Arch, folder: Path, world: World, dtype: torch.dtype) -> Tensor | None:
    """The teacher's output layer in the student's tensor parallel layout, [v/tp, h_t] on the last stage; reached by all ranks."""
    tp, state = world.groups.tp, {}
    if world.is_last_stage:
        empty = torch.empty((arch.padded_vocab_size // tp.size(), arch.hidden_size), dtype=dtype)
        state["head"] = checkpoint.vocabulary_shard(arch, empty, world)
    loaded = checkpoint.load(state, folder)
    return loaded["head"].to(world.device) if world.is_last_stage else None


def serve(
    chunks: list[Any],
    world: World,
    shape: Shape,
    teacher: Grid,
    sender: Any,
    batch_of: Callable[[int], Batch],
    ids: Sequence[int],
    *,
    group: int,
    vocab_size: int,
    top_k: int = 0,
    temperature: float = 1.0,
    pairs: Pairs | None = None,
    progress: Callable[[int], None] = lambda count: None,
    ending: Ending | None = None,
) -> None:
    """Run the teacher over its replica's share of the ids and send what it makes; reached by all ranks of the teacher.

    sender: stream.Sender, stream.Senders or cache.Writer, on the last stage. batch_of(id): the microbatch of an id, whole. group:
    microbatches that may go through the pipeline together. pairs: what is sent has the states behind the hidden states. Runs ahead
    of the student as far as the sender has room, over optimizer steps as well: the teacher is frozen and the data known. ending: asked
    before each group whether the ids end early. Returns when everything is consumed.
    """
    pack = partial(
        payload_of, chunks[-1], shape, world, vocab_size=vocab_size, top_k=top_k, temperature=temperature
    )
    capture = pairs and Capture(
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
            limit = ending.limit(ids[place], world.leaving)
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
        signals = run(chunks, batches, world, lambda hidden, _: hidden if capture else pack(hidden))
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


def payload_of(
    model: Any, shape: Shape, world: World, hidden: Tensor, *, vocab_size: int, top_k: int, temperature: float
) -> Tensor:
    """What a rank of the teacher's last stage sends, [s', b, n'], from hidden [s', b, h]."""
    if shape.payload == "logits":
        return logits(model, hidden).to(shape.dtype)
    own = hidden
    if shape.payload == "topk":
        # From float32: in logits rounded to bf16 the probabilities would be off by percents.
        tokens, b = shape.sequence_length // world.parallel.cp, hidden.shape[1]
        parts = losses.float32_logits(hidden, output_weight(model), tokens, world.groups.tp)
        own = torch.cat(
            [pack_top_k(top_k_of(z, top_k, vocab_size, world.groups.tp, temperature)) for z in parts]
        ).view(tokens, b, -1)
    tp = world.groups.tp
    if splits_sequence(shape, world.parallel) and not (
        shape.payload == "hidden" and world.parallel.sequence_parallel
    ):
        own = own.chunk(tp.size())[tp.rank()]  # all tensor parallel ranks have all tokens; each sends a part
    return own


def top_k_of(z: Tensor, k: int, vocab_size: int, group: Any, temperature: float) -> TeacherTopK:
    """The k most likely tokens and the mass of the rest from logits [..., v/tp], at a temperature; equal on all ranks of the group."""
    columns, first = z.shape[-1], group.rank() * z.shape[-1]
    z = z.float() / temperature
    z[..., max(0, vocab_size - first) :] = -torch.inf
    values, indices = z.topk(min(k, columns), dim=-1)
    values, order = _gather_last(values, group).topk(k, dim=-1)
    indices = _gather_last(indices + first, group).gather(-1, order)
    # The rest is summed: one minus the k would cancel. Tokens of other ranks go to a column behind the last.
    place = indices - first
    rest = F.pad(z, (0, 1), value=-torch.inf).scatter_(
        -1, torch.where((place >= 0) & (place < columns), place, columns), -torch.inf
    )
    rest = torch.logsumexp(_gather_last(torch.logsumexp(rest, -1, keepdim=True), group), -1, keepdim=True)
    total = torch.logaddexp(torch.logsumexp(values, -1, keepdim=True), rest)
    return TeacherTopK(indices, values - total, rest - total)


def _gather_last(x: Tensor, group: Any) -> Tensor:
    """[..., n] of each rank -> [..., tp n]."""
    if group.size() == 1:
        return x
    parts = x.new_empty((group.size(), *x.shape))
    dist.all_gather_into_tensor(parts.view(-1, *x.shape[1:]), x.contiguous(), group=group)
    return torch.cat(list(parts), -1)


def pack_top_k(top: TeacherTopK) -> Tensor:
    """int32 [s, b, 2k + 1]: the bits of log_probs and log_ghost, and the indices."""
    return torch.cat(
        [top.log_probs.view(torch.int32), top.log_ghost.view(torch.int32), top.indices.int()], -1
    )


def unpack_top_k(packed: Tensor) -> TeacherTopK:
    k = packed.shape[-1] // 2
    log_probs, log_ghost, indices = packed.split([k, 1, k], -1)
    return TeacherTopK(
        indices.long(), log_probs.contiguous().view(torch.float32), log_ghost.contiguous().view(torch.float32)
    )
