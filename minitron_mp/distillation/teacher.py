"""Teacher: the interface of a teacher for training and evaluation, and its two frozen forms.

    signals()        microbatches of a step -> one TeacherSignal each; with_signals() adds it to
                     the batch
    target()         TeacherSignal -> TeacherTarget, for the loss on the last stage
    hidden_states()  TeacherSignal -> hidden states, for losses inside the student

ColocatedTeacher runs on the student's ranks, in the student's layout. RemoteTeacher receives
signals from a teacher on other ranks (serve.py, stream.py), or reads signals on disk (cache.py). A
teacher that is trained at the same time is training.teacher_correction.TrainableTeacher.

    s' is s/cp, or s/cp/tp under sequence parallelism  b microbatch  h_t hidden size of the teacher
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from minitron_mp.distillation.layer_pairs import LayerPairs
from minitron_mp.distillation.state_capture import HiddenStateCapture
from minitron_mp.distillation.stream_end import StreamEnd
from minitron_mp.distillation.stream_layout import Payload, Traffic
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.world import World
from minitron_mp.losses.objective import TeacherHidden, TeacherLogits, TeacherTarget
from minitron_mp.losses.top_k import unpack_top_k
from minitron_mp.models.sharded_model import ShardedModel, output_weight


@dataclass(frozen=True)
class TeacherSignal:
    """The teacher's part of one microbatch.

    microbatch: number of the microbatch in the run. A remote teacher sends its signal with it.
    hidden [s', b, h_t]: output of the final norm, on the last stage of a colocated teacher; else
        None.
    states [s', b, h_t] each: hidden states of a colocated teacher that this stage compares.
    """

    microbatch: int
    hidden: Tensor | None = None
    states: Sequence[Tensor] = ()


class Teacher(Protocol):
    """Interface of a teacher for the training loop and evaluation. All student ranks have one."""

    @property
    def model(self) -> ShardedModel | None:
        """The teacher's model on this rank, or None for a teacher that runs on other ranks."""

    @property
    def pairs(self) -> LayerPairs | None:
        """Pairs of hidden states that this teacher provides, or None."""

    @property
    def stream_end(self) -> StreamEnd | None:
        """Early end of the teacher's stream, or None when there is no stream."""

    def signals(self, batches: Sequence[Batch], step: int) -> list[TeacherSignal]:
        """Return one signal for each microbatch of this data-parallel rank; called by all ranks."""

    def target(self, signal: TeacherSignal) -> TeacherTarget:
        """Return the target of the loss, on the last pipeline stage."""

    def hidden_states(self, signal: TeacherSignal) -> Sequence[Tensor]:
        """Return the teacher's states [s', b, h_t] that this stage compares, in order of the pairs.

        Called before the forward pass of each chunk of this stage.
        """

    def release(self, signal: TeacherSignal) -> None:
        """Free a signal that the loss has used, on the last pipeline stage."""

    def traffic(self) -> Traffic | None:
        """Return the traffic so far, or None on a rank without a stream."""

    def close(self) -> None:
        """End the work of the teacher; called by all ranks after the last step."""


class SignalReceiver(Protocol):
    """Source of the signals of a RemoteTeacher: receiver.Receiver, or cache.Reader."""

    def get(self, id: int) -> Tensor:
        """Wait for a microbatch and return this rank's part [s', b, n']."""

    def release(self, id: int) -> None:
        """Let the teacher send one more microbatch."""

    def traffic(self) -> Traffic | None:
        """Return the traffic so far, or None for signals on disk."""

    def close(self) -> None:
        """Stop receiving."""


class ColocatedTeacher:
    """A frozen teacher on the student's ranks, in the student's layout.

    It runs the microbatches of a step before the student, with a forward-only schedule. The last
    stage then holds the hidden states after the final norm (2h bytes per token in bf16). Each stage
    holds as many bytes for each pair of hidden states that it compares. The loss applies the
    teacher's output layer to one chunk of tokens at a time.
    """

    stream_end = None

    def __init__(self, model: ShardedModel, pairs: LayerPairs | None = None):
        """Freeze the model and use it as the teacher."""
        self.model = model.freeze()
        self.world = model.world
        self.pairs = pairs
        self.capture: HiddenStateCapture | None = None
        if pairs is not None:
            routes = pairs.routes(self.world.parallel, pairs.blocks(self.world.parallel))
            self.capture = HiddenStateCapture(model.chunks, self.world, routes, model.arch.num_layers)

    def signals(self, batches: Sequence[Batch], step: int) -> list[TeacherSignal]:
        if self.capture:
            # Delete states of other forward passes of this model, such as an evaluation of its KL.
            self.capture.clear()
        hidden = self.model.forward(batches, lambda hidden, _: hidden) or [None] * len(batches)
        states = self.capture.take(batches) if self.capture else [[] for _ in batches]
        return list(map(TeacherSignal, microbatch_numbers(len(batches), step, self.world), hidden, states))

    def target(self, signal: TeacherSignal) -> TeacherTarget:
        assert signal.hidden is not None
        return TeacherHidden(signal.hidden, output_weight(self.model.last_chunk))

    def hidden_states(self, signal: TeacherSignal) -> Sequence[Tensor]:
        return signal.states

    def release(self, signal: TeacherSignal) -> None: ...

    def traffic(self) -> Traffic | None:
        return None

    def close(self) -> None: ...


class RemoteTeacher:
    """A teacher on other ranks, or a teacher whose signals are on disk.

    receiver: on the last stage, and on stages that compare hidden states; else None.
    head [v/tp, h_t]: weight of the teacher's output layer on the last stage, for payload "hidden",
        see load_head().
    stream_end: early end of the stream.
    held_out: teacher with the signals of the held-out text of validations. Its batches are numbered
        separately, from 0.
    """

    model = None

    def __init__(
        self,
        receiver: SignalReceiver | None,
        payload: Payload,
        head: Tensor | None,
        world: World,
        pairs: LayerPairs | None = None,
        stream_end: StreamEnd | None = None,
        held_out: RemoteTeacher | None = None,
    ):
        self.held_out = held_out
        self.receiver = receiver
        self.payload = payload
        self.head = head
        self.world = world
        self.pairs = pairs
        self.stream_end = stream_end
        self.held: dict[int, Tensor] = {}
        """Microbatch -> signal that a chunk of this stage still needs. Only used with pairs."""
        self.num_uses: Counter[int] = Counter()
        """Microbatch -> number of chunks of this stage that have used its signal."""

    def signals(self, batches: Sequence[Batch], step: int) -> list[TeacherSignal]:
        return list(map(TeacherSignal, microbatch_numbers(len(batches), step, self.world)))

    def target(self, signal: TeacherSignal) -> TeacherTarget:
        assert self.receiver is not None, "signals arrive on the last stage"
        if self.pairs:
            received = self.held.pop(signal.microbatch)[..., : self.pairs.teacher.hidden_size]
        else:
            received = self.receiver.get(signal.microbatch)
        if self.payload == "hidden":
            assert self.head is not None
            return TeacherHidden(received, self.head)
        return TeacherLogits(received) if self.payload == "logits" else unpack_top_k(received)

    def hidden_states(self, signal: TeacherSignal) -> Sequence[Tensor]:
        """Return the teacher's states that this stage compares, in order of the pairs.

        Under tensor parallelism a state may contain only this rank's tokens. The signal is released
        before the first chunk runs. Otherwise a small window would cause a deadlock, because an
        interleaved schedule runs the first chunk on several microbatches before the first loss.
        """
        if self.receiver is None or self.pairs is None:
            return []
        number = signal.microbatch
        if number not in self.held:
            self.held[number] = self.receiver.get(number)
            self.receiver.release(number)
        blocks = self.held[number].split(self.pairs.teacher.hidden_size, -1)
        self.num_uses[number] += 1
        if self.num_uses[number] == (self.world.parallel.vpp or 1):
            del self.num_uses[number]
            if not self.world.is_last_stage:
                del self.held[number]
        # On the last stage the first block is for target().
        return blocks[1:] if self.world.is_last_stage else blocks

    def release(self, signal: TeacherSignal) -> None:
        assert self.receiver is not None
        if not self.pairs:
            self.receiver.release(signal.microbatch)

    def traffic(self) -> Traffic | None:
        return self.receiver.traffic() if self.receiver is not None else None

    def close(self) -> None:
        if self.receiver is not None:
            self.receiver.close()


def with_signals(teacher: Teacher | None, batches: Sequence[Batch], step: int = 0) -> list[Batch]:
    """Return the microbatches with the teacher's signals, or unchanged without a teacher."""
    if teacher is None:
        return list(batches)
    signals = teacher.signals(batches, step)
    return [{**batch, "teacher_signal": signal} for batch, signal in zip(batches, signals)]


def signal_of(batch: Batch) -> TeacherSignal:
    """Return the signal that with_signals() added to a batch."""
    signal = batch["teacher_signal"]
    assert isinstance(signal, TeacherSignal)
    return signal


def microbatch_numbers(count: int, step: int, world: World) -> range:
    """Return the numbers in the run of this data-parallel rank's `count` microbatches of a step."""
    dp = world.groups.dp
    first = step * count * dp.size() + dp.rank()
    return range(first, first + count * dp.size(), dp.size())
