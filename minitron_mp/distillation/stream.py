"""Transport of teacher signals between the ranks of two roles: the protocol and the sending end.

stream_layout.py defines the terms, and the source and target rank of each block. Hidden-state
losses inside the student need signals on further stages. Each such stage has a separate link.

    teacher                                   student
    waits until microbatch i - window is consumed
    computes, announces i on `control`   -->  a listening thread receives it, and posts the receive
    sends the blocks on `data`           -->  get(i) returns the signal to the loss
                                         <--  release(i): credit on `control`

Both ends process microbatches in ascending order, so the smallest unfinished one can always
complete, and no window causes a deadlock. The student posts a receive only after the send is
announced, so no NCCL kernel waits on the student's GPU beside its collectives. Announcements and
credits use a separate gloo group, because NCCL ignores tags and matches messages by order only.
Every wait has the timeout of the channel, and its error names the rank at fault. That may be a
third rank: a student may wait for a teacher that waits for a different student, see Link.error().

A teacher may end the stream early. It then announces END_OF_STREAM to each receiver. The student
must not call get() for a later microbatch: that raises StreamError. close() raises no error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mp.distillation.stream_layout import Grid, Message, StreamShape, messages
from minitron_mp.distributed.role_channel import RoleChannel

STREAM_VERSION = 2
"""Version of messages() and of their content. Both ends must have the same version."""

ANNOUNCE, CREDIT, DATA = 1, 2, 3
"""Tags. gloo matches messages by them, NCCL ignores them."""

END_OF_STREAM = -1
"""Value that is announced instead of a microbatch when no further one is sent."""


class StreamError(RuntimeError):
    """Error of a broken stream. Its text names the rank at fault."""


@dataclass
class Link:
    """Settings and counters of a connection between the teacher and one stage of its students.

    window: largest number of microbatches in flight per teacher replica. stage: receiving pipeline
    stage of the students; -1 is the last. Two ranks share at most one link, so the order of
    messages identifies them.
    """

    channel: RoleChannel
    shape: StreamShape
    teacher: Grid
    students: Sequence[Grid]
    window: int
    stage: int = -1
    num_bytes: int = 0
    """Bytes that this rank has sent or received."""
    wait_s: float = 0.0
    """Seconds for which the student's host has waited for signals."""

    def messages(self, id: int, student: Grid) -> tuple[Message, ...]:
        """Return the messages with the blocks of a microbatch for a student."""
        dp = id % self.teacher.dp, id % student.dp
        return messages(self.shape, self.teacher, student, *dp, self.stage)

    def to_stages(self, blocks: Mapping[int, Sequence[int]]) -> dict[int, Link]:
        """Return {stage: its link}. blocks: {stage: numbers of the blocks that it receives}.

        A block has this link's width.
        """
        links = {}
        for stage, numbers in blocks.items():
            shape = replace(self.shape, width=len(numbers) * self.shape.width)
            links[stage] = replace(self, stage=stage, shape=shape)
        return links

    def error(self, rank: int, what: str, cause: BaseException | None = None) -> StreamError:
        """Return the error of this rank's wait for `rank`. Its text names the root cause.

        what: action of that rank that is missing or wrong.
        cause: error of the wait, or None if the rank sent a wrong value.

        When a wait ends, gloo closes all connections, so all waiting ranks call this at about the
        same time.
        """
        text = f"{self.describe(rank)} {what}"
        if cause is None:
            return StreamError(self.channel.failure() or self.channel.report_failure(text))
        if str(cause):
            reason = str(cause).splitlines()[0].split("] ")[-1].split(". ")[0]
            text += f" ({reason})"
        root_cause = self.channel.find_root_cause(rank, text)
        return StreamError(self.channel.failure() or self.channel.report_failure(root_cause))

    @contextmanager
    def naming(self, rank: int, what: str) -> Iterator[None]:
        """Raise error(rank, what) if a transfer with `rank` fails.

        It also contains the start of a transfer, because gloo refuses to start one with a rank
        whose connection is closed.
        """
        try:
            yield
        except RuntimeError as error:
            raise self.error(rank, what, error) from error

    def describe(self, rank: int) -> str:
        """Return role and coordinates of a job rank."""
        grids = (self.teacher, *self.students)
        grid = next(grid for grid in grids if grid.first <= rank < grid.first + grid.size)
        return grid.describe(rank)


@dataclass
class _Send:
    """A microbatch in flight.

    credits: {receiver: (receive of its credit, the credit)}.
    """

    id: int
    credits: dict[int, tuple[dist.Work, Tensor]]
    works: list[tuple[int, dist.Work, Tensor]]
    """(Receiver, send, its tensor, which must exist until the send is done)."""


class Sender:
    """The teacher's end, on one rank of its last stage.

    It holds at most `window` microbatches that a student has not consumed.
    """

    def __init__(self, link: Link):
        self.link = link
        self.in_flight: deque[_Send] = deque()
        self.ends: list[tuple[int, dist.Work, Tensor]] = []
        """Announcements of the end of the stream: (receiver, send, its tensor)."""

    def make_room(self, count: int = 1) -> None:
        """Wait until `count` more microbatches may be in flight."""
        assert count <= self.link.window, f"{count} microbatches at once in a window of {self.link.window}"
        while len(self.in_flight) > self.link.window - count:
            self._wait_for_oldest()

    def send(self, id: int, signal: Tensor, computed: torch.cuda.Event | None = None) -> None:
        """Send this rank's part [s', b, n'] of a microbatch.

        The signal must stay unchanged until its credits have arrived. computed: event after the
        computation of the signal. Default: the work that this thread has issued.
        """
        link, channel = self.link, self.link.channel
        assert len(self.in_flight) < link.window, "call make_room() first"
        blocks = [
            block
            for student in link.students
            for block in link.messages(id, student)
            if block.source == channel.rank
        ]
        sent = _Send(id, {}, [])
        # Announce a signal only after it is computed. The announcement makes the student post its
        # receive. An NCCL kernel that waits for this rank's forward pass would take multiprocessors
        # from the student's work.
        channel.synchronize(computed)
        for target in dict.fromkeys(block.target for block in blocks):
            number, credit = torch.tensor([id]), torch.empty(1, dtype=torch.int64)
            with link.naming(target, f"did not take microbatch {id}"):
                sent.works.append((target, channel.control.send([number], target, ANNOUNCE), number))
                sent.credits[target] = channel.control.recv([credit], target, CREDIT), credit
        with channel.transfer_stream(behind_current=False):
            channel.record_stream(signal)
            for block in blocks:
                part = signal[block.source_rows, :, block.source_columns].contiguous()
                with link.naming(block.target, f"did not take microbatch {id}"):
                    work = channel.data.send([part], block.target, DATA)
                sent.works.append((block.target, work, part))
                link.num_bytes += part.nbytes
        self.in_flight.append(sent)

    def finish(self) -> None:
        """Wait until the students have consumed all microbatches in flight, and know of the end.

        gloo drops a message whose receive is not posted yet when its sender lets go of it.
        """
        while self.in_flight:
            self._wait_for_oldest()
        for target, work, _ in self.ends:
            with self.link.naming(target, "did not take the end of the stream"):
                work.wait(self.link.channel.timeout)

    def end(self, first: int, last: int) -> None:
        """Send end-of-stream for microbatches [first, last) to each receiver.

        The rank that would send the receiver's next microbatch sends it.
        """
        link, channel = self.link, self.link.channel
        for student in link.students:
            for id in range(first, min(first + student.dp, last)):  # one for each replica
                next_source: dict[int, int] = {}
                for block in link.messages(id, student):
                    next_source.setdefault(block.target, block.source)
                for target, source in next_source.items():
                    if source == channel.rank:
                        number = torch.tensor([END_OF_STREAM])
                        with link.naming(target, "did not take the end of the stream"):
                            work = channel.control.send([number], target, ANNOUNCE)
                        self.ends.append((target, work, number))

    def _wait_for_oldest(self) -> None:
        """Wait until all students have consumed the oldest microbatch in flight."""
        link, oldest = self.link, self.in_flight[0]
        for target, (work, credit) in oldest.credits.items():
            with link.naming(target, f"did not consume microbatch {oldest.id}"):
                work.wait(link.channel.timeout)
            if credit.item() != oldest.id:
                what = f"consumed microbatch {credit.item()}, but microbatch {oldest.id} was due"
                raise link.error(target, what)
        for target, work, _ in oldest.works:
            with link.naming(target, f"did not take microbatch {oldest.id}"):
                work.wait(link.channel.timeout)
        self.in_flight.popleft()


class Senders:
    """Sends to several stages of the students. Each stage receives its blocks of the signal.

    width: number of columns of a block.
    """

    def __init__(self, links: Mapping[int, Link], blocks: Mapping[int, Sequence[int]], width: int):
        self.width = width
        self.parts = [(Sender(link), blocks[stage]) for stage, link in links.items()]

    def make_room(self, count: int = 1) -> None:
        for sender, _ in self.parts:
            sender.make_room(count)

    def send(self, id: int, signal: Tensor, computed: torch.cuda.Event | None = None) -> None:
        """Send this rank's part [s', b, width x all blocks] of a microbatch; see Sender.send()."""
        blocks = signal.split(self.width, -1)
        for sender, numbers in self.parts:
            channel = sender.link.channel
            channel.synchronize(computed)
            with channel.transfer_stream(behind_current=False):
                channel.record_stream(signal)
                part = torch.cat([blocks[number] for number in numbers], -1)
            sender.send(id, part, computed)

    def finish(self) -> None:
        for sender, _ in self.parts:
            sender.finish()

    def end(self, first: int, last: int) -> None:
        for sender, _ in self.parts:
            sender.end(first, last)
