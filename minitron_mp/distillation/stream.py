"""Transport of teacher signals between the ranks of two roles: the two ends of the stream.

stream_layout.py has the terms, and which block goes from which rank to which. Hidden-state losses inside the
student need signals on other stages than the last one, too: each such stage has a link of its own.

    teacher                                   student
    waits until microbatch i - window is consumed
    computes, announces i on `control`   -->  a listening thread receives it, and posts the receive
    sends the blocks on `data`           -->  get(i) returns the signal to the loss
                                         <--  release(i): credit on `control`

Both ends walk microbatches in ascending order, so the smallest unfinished one can always complete, and no
window deadlocks. A receive is posted only after its send, so no NCCL kernel waits on the student's GPU beside
its collectives. Credits have their own gloo group, because NCCL ignores tags and only the order counts. Every
wait ends after the timeout of the channel, with the name of the rank at fault: a student may wait for a
teacher that waits for another student, see Link.error().
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mp.distillation.stream_layout import Grid, Message, StreamShape, Traffic, messages
from minitron_mp.distributed.role_channel import RoleChannel

STREAM_VERSION = 2
"""Of messages() and of what travels with them. Both ends must have the same version."""

ANNOUNCE, CREDIT, DATA = 1, 2, 3
"""Tags. gloo matches messages by them, NCCL ignores them."""

END_OF_STREAM = -1
"""Announced in place of a microbatch: no further one is sent."""


class StreamError(RuntimeError):
    """The stream broke. The message names the rank at fault."""


@dataclass
class Link:
    """What both ends share.

    window: microbatches in flight per teacher replica. stage: of the students, which receives; -1 is the
    last. Two ranks share at most one link, so the order of messages identifies them.
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
        """Return the blocks of a microbatch that go to a student."""
        dp = id % self.teacher.dp, id % student.dp
        return messages(self.shape, self.teacher, student, *dp, self.stage)

    def to_stages(self, blocks: Mapping[int, Sequence[int]]) -> dict[int, Link]:
        """Return {stage: its link}. blocks: {stage: the blocks of this link's width that it receives}."""
        return {
            stage: replace(self, stage=stage, shape=replace(self.shape, width=len(own) * self.shape.width))
            for stage, own in blocks.items()
        }

    def error(self, rank: int, what: str, cause: BaseException | None = None) -> StreamError:
        """Return the error of this rank's wait for `rank`. The message names the rank at the end of the waits.

        what: what that rank did not do. cause: error of the wait; None when the rank sent something wrong.
        When a wait ends, gloo closes all connections, so all waiting ranks come here at about the same time.
        """
        text = f"{self.describe(rank)} {what}"
        if cause is None:
            return StreamError(self.channel.failure() or self.channel.report_failure(text))
        if str(cause):
            reason = str(cause).splitlines()[0].split("] ")[-1].split(". ")[0]
            text += f" ({reason})"
        root_cause = self.channel.find_root_cause(rank, text)
        return StreamError(self.channel.failure() or self.channel.report_failure(root_cause))

    def describe(self, rank: int) -> str:
        """Return role and coordinates of a job rank."""
        grids = (self.teacher, *self.students)
        grid = next(grid for grid in grids if grid.first <= rank < grid.first + grid.size)
        return grid.describe(rank)


@dataclass
class _Send:
    """A microbatch in flight. credits: {receiver: (receive of its credit, the credit)}. works: sends in progress."""

    id: int
    credits: dict[int, tuple[dist.Work, Tensor]]
    works: list[tuple[dist.Work, Tensor]]
    """With their tensors, which must live until the send is done."""


class Sender:
    """The teacher's end, on one rank of its last stage.

    It holds at most `window` microbatches that a student has not consumed.
    """

    def __init__(self, link: Link):
        self.link = link
        self.in_flight: deque[_Send] = deque()
        self.ends: list[tuple[dist.Work, Tensor]] = []
        """Announcements of the end of the stream."""

    def make_room(self, count: int = 1) -> None:
        """Wait until `count` more microbatches may be in flight."""
        assert count <= self.link.window, f"{count} microbatches at once in a window of {self.link.window}"
        while len(self.in_flight) > self.link.window - count:
            self._wait_for_oldest()

    def send(self, id: int, signal: Tensor) -> None:
        """Send this rank's part [s', b, n'] of a microbatch. It may be overwritten after its credits have come."""
        link, channel = self.link, self.link.channel
        assert len(self.in_flight) < link.window, "call make_room() first"
        blocks = [
            block
            for student in link.students
            for block in link.messages(id, student)
            if block.source == channel.rank
        ]
        sent = _Send(id, {}, [])
        # Announced only when the signal is computed. The student then posts its receive, and an NCCL kernel
        # that waits for this rank's forward pass would take multiprocessors from the student's work.
        channel.synchronize()
        for target in dict.fromkeys(block.target for block in blocks):
            number = torch.tensor([id])
            sent.works.append((channel.control.send([number], target, ANNOUNCE), number))
            credit = torch.empty(1, dtype=torch.int64)
            sent.credits[target] = channel.control.recv([credit], target, CREDIT), credit
        with channel.transfer_stream():
            channel.record_stream(signal)
            for block in blocks:
                part = signal[block.source_rows, :, block.source_columns].contiguous()
                sent.works.append((channel.data.send([part], block.target, DATA), part))
                link.num_bytes += part.nbytes
        self.in_flight.append(sent)

    def finish(self) -> None:
        """Wait until everything sent is consumed."""
        while self.in_flight:
            self._wait_for_oldest()

    def end(self, first: int, last: int) -> None:
        """Send end-of-stream for microbatches [first, last) to each receiver.

        It comes from the rank that would have sent the receiver's next microbatch.
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
                        # Not waited for: a receiver that is closed does not listen.
                        self.ends.append((channel.control.send([number], target, ANNOUNCE), number))

    def _wait_for_oldest(self) -> None:
        """Wait until all students have consumed the oldest microbatch in flight."""
        link, oldest = self.link, self.in_flight[0]
        for target, (work, credit) in oldest.credits.items():
            try:
                work.wait(link.channel.timeout)
            except RuntimeError as error:
                raise link.error(target, f"did not consume microbatch {oldest.id}", error) from error
            if credit.item() != oldest.id:
                what = f"consumed microbatch {credit.item()}, but microbatch {oldest.id} was due"
                raise link.error(target, what)
        for work, _ in oldest.works:
            work.wait(link.channel.timeout)
        self.in_flight.popleft()


class Senders:
    """A sender to several stages of the students. Each stage gets its blocks of `width` columns of the signal."""

    def __init__(self, links: Mapping[int, Link], blocks: Mapping[int, Sequence[int]], width: int):
        self.width = width
        self.parts = [(Sender(link), blocks[stage]) for stage, link in links.items()]

    def make_room(self, count: int = 1) -> None:
        for sender, _ in self.parts:
            sender.make_room(count)

    def send(self, id: int, signal: Tensor) -> None:
        """Send this rank's part [s', b, width x all blocks] of a microbatch."""
        blocks = signal.split(self.width, -1)
        for sender, numbers in self.parts:
            sender.send(id, torch.cat([blocks[number] for number in numbers], -1))

    def finish(self) -> None:
        for sender, _ in self.parts:
            sender.finish()

    def end(self, first: int, last: int) -> None:
        for sender, _ in self.parts:
            sender.end(first, last)


class _Broken(Exception):
    """A failure in the listening thread: the job rank at the other end, and what it did."""

    def __init__(self, rank: int, what: str):
        super().__init__(rank, what)
        self.rank, self.what = rank, what


@dataclass
class _Arrival:
    """A received signal. event: the end of its transfer on a GPU."""

    signal: Tensor
    event: Any = None


class Receiver:
    """The student's end, on one rank of a stage: get(id) and release(id) in ascending order of `ids`.

    A thread listens, so that transfers continue while the student computes.
    """

    def __init__(self, link: Link, student: Grid, ids: Sequence[int], device: torch.device):
        self.link, self.student, self.ids, self.device = link, student, ids, device
        self.arrived: dict[int, _Arrival] = {}
        self.credits = dict.fromkeys(range(link.teacher.dp), link.window)
        """Microbatches that each teacher replica may still put in flight."""
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.closed = False
        self.thread = threading.Thread(target=self._listen, name="teacher stream", daemon=True)
        self.thread.start()

    def get(self, id: int) -> Tensor:
        """Wait for a microbatch and return this rank's part [s', b, n']."""
        start = time.perf_counter()
        with self.changed:
            # Ends within the timeout, because the waits of the thread do.
            self.changed.wait_for(lambda: id in self.arrived or self.failure is not None)
            arrival = self.arrived.pop(id, None)
        self.link.wait_s += time.perf_counter() - start
        if arrival is None:
            failure = self.failure
            if not isinstance(failure, _Broken):
                raise RuntimeError(str(failure)) from failure
            # Reported only now that this rank waits. Before, its thread alone was waiting, ahead of it.
            raise self.link.error(failure.rank, failure.what, failure.__cause__) from failure
        if arrival.event is not None:
            torch.cuda.current_stream().wait_event(arrival.event)
            arrival.signal.record_stream(torch.cuda.current_stream())
        return arrival.signal

    def release(self, id: int) -> None:
        """Let the teacher send one more microbatch: the signal is used, or kept by the caller."""
        link, channel = self.link, self.link.channel
        for source in dict.fromkeys(block.source for block in self._blocks(id)):
            try:
                channel.control.send([torch.tensor([id])], source, CREDIT).wait(channel.timeout)
            except RuntimeError as error:
                raise link.error(source, f"did not take the credit for microbatch {id}", error) from error
        with self.changed:
            self.credits[id % link.teacher.dp] += 1
            self.changed.notify_all()

    def traffic(self) -> Traffic:
        """Return the time that this rank has waited, and the bytes that it has received, so far."""
        return Traffic(self.link.wait_s, self.link.num_bytes)

    def close(self) -> None:
        """Stop listening."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join()

    def _blocks(self, id: int) -> list[Message]:
        rank = self.link.channel.rank
        return [block for block in self.link.messages(id, self.student) if block.target == rank]

    def _listen(self) -> None:
        """Receive all microbatches; the body of the thread."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a new thread starts with the first GPU
        try:
            for id in self.ids:
                if not self._take_credit(id % self.link.teacher.dp):
                    return
                arrival = self._receive(id)
                if arrival is None:
                    return
                with self.changed:
                    self.arrived[id] = arrival
                    self.changed.notify_all()
        except BaseException as error:
            with self.changed:
                self.failure = error
                self.changed.notify_all()

    def _take_credit(self, replica: int) -> bool:
        """Wait until a teacher replica may send. Return whether to go on.

        So the wait for its announcement is for the teacher alone, however long this side pauses.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.credits[replica] > 0 or self.closed)
            if self.closed:
                return False
            self.credits[replica] -= 1
            return True

    def _receive(self, id: int) -> _Arrival | None:
        """Receive a microbatch; None at the end of the stream."""
        channel, shape, blocks = self.link.channel, self.link.shape, self._blocks(id)
        for source in dict.fromkeys(block.source for block in blocks):
            number = torch.empty(1, dtype=torch.int64)
            try:
                channel.control.recv([number], source, ANNOUNCE).wait(channel.timeout)
            except RuntimeError as error:
                raise _Broken(source, f"did not announce microbatch {id}") from error
            if number.item() == END_OF_STREAM:
                return None
            if number.item() != id:
                what = f"announced microbatch {number.item()}, but microbatch {id} was due"
                raise _Broken(source, what)
        with channel.transfer_stream(
            behind_current=False
        ):  # the buffer is new, so nothing precedes the transfer
            signal = torch.empty(shape.local(self.student.parallel), dtype=shape.dtype, device=self.device)
            parts = []
            for block in blocks:
                view = signal[block.target_rows, :, block.target_columns]
                part = (
                    view
                    if view.is_contiguous()
                    else torch.empty_like(view, memory_format=torch.contiguous_format)
                )
                parts.append((channel.data.recv([part], block.source, DATA), block, view, part))
                self.link.num_bytes += part.nbytes
            for work, block, view, part in parts:
                try:
                    work.wait(channel.timeout)
                except RuntimeError as error:
                    raise _Broken(block.source, f"stopped in the middle of microbatch {id}") from error
                if part is not view:
                    view.copy_(part)
            return _Arrival(signal, channel.record_event())
