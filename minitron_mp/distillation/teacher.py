"""The teacher as a source of signals: for each microbatch of a step, what the loss on the student's last stage needs.

Two placements behind one interface (signals, target, release; states, where losses inside the student want some). ColocatedTeacher
runs on the student's ranks, in the student's layout. RemoteTeacher is the student's view of a teacher on ranks of its own, where
serve() runs, or of what one left on disk; stream.py and cache.py carry the signals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_mp.artifacts.checkpoint import load_checkpoint, vocabulary_shard
from minitron_mp.distillation.hidden_states import HiddenStateCapture, LayerPairs
from minitron_mp.distillation.stream_end import StreamEnd
from minitron_mp.distillation.stream_layout import Payload
from minitron_mp.distributed.schedule import Batch
from minitron_mp.distributed.world import World
from minitron_mp.losses.fused import TeacherHidden, TeacherLogits, TeacherTarget
from minitron_mp.losses.top_k import unpack_top_k
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import output_weight
from minitron_mp.models.sharded_model import ShardedModel


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

    def __init__(self, model: ShardedModel, *, pairs: LayerPairs | None = None):
        """Freeze the model and use it as the teacher."""
        world = model.world
        self.model, self.world, self.pairs = model.freeze(), world, pairs
        self.capture = pairs and HiddenStateCapture(
            model.chunks,
            world,
            pairs.routes(world.parallel, pairs.blocks(world.parallel)),
            model.arch.num_layers,
        )

    def signals(self, batches: Sequence[Batch], step: int) -> list[Signal]:
        """One entry a microbatch, on all ranks."""
        if self.capture:
            self.capture.forget()  # of passes for something else: tell_drift() measures these chunks before the first step
        hidden = self.model.forward(batches, lambda hidden, _: hidden) or [None] * len(batches)
        states = self.capture.take(batches) if self.capture else [[] for _ in batches]
        return list(map(Signal, hidden, states))

    def target(self, signal: Signal) -> TeacherTarget:
        """What the loss takes, on the last stage."""
        assert signal.hidden is not None
        return TeacherHidden(signal.hidden, output_weight(self.model.last_chunk))

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
        pairs: LayerPairs | None = None,
        ending: StreamEnd | None = None,
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

    def target(self, signal: int) -> TeacherTarget:
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


def load_head(arch: Arch, folder: Path, world: World, dtype: torch.dtype) -> Tensor | None:
    """The teacher's output layer in the student's tensor parallel layout, [v/tp, h_t] on the last stage; reached by all ranks."""
    tp, state = world.groups.tp, {}
    if world.is_last_stage:
        empty = torch.empty((arch.padded_vocab_size // tp.size(), arch.hidden_size), dtype=dtype)
        state["head"] = vocabulary_shard(arch, empty, world)
    loaded = load_checkpoint(state, folder)
    return loaded["head"].to(world.device) if world.is_last_stage else None
