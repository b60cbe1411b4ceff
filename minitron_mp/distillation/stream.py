"""Transport of teacher signals between two grids of ranks: who sends which block of a microbatch to whom, and the two ends.

    id  number of a microbatch in the run: step * microbatches a step + its place in the step
    s   sequence length   b microbatch   n payload width: h for hidden, padded vocabulary for logits, 2 k + 1 for topk

A signal is one tensor [s, b, n] a microbatch, spread over the last pipeline stage of the teacher and wanted, spread otherwise, on
the last stage of the student; for losses inside the student (states.py) each stage that wants something has a link of its own.
Microbatch id belongs to replica id % dp on either side. messages() is a pure function of the replicas and the layouts, so both ends
know every transfer without asking, and all walk ids in ascending order: the smallest unfinished one can always complete, so nothing
deadlocks at any window.

    teacher                                   student
    waits until id - window is consumed
    computes, announces id on `control`  -->  a listening thread hears it, then posts the receive
    sends the blocks on `data`           -->  get(id) hands the signal to the loss
                                         <--  release(id): credit on `control`

A receive is posted only when its send is, so no NCCL kernel waits on the student's GPU beside its collectives; credits have their
own gloo group, because NCCL knows no tags and only order counts. Every wait ends after bridge.timeout with the name of the rank
that is to blame: a student may wait for a teacher that waits for another student, see Link.fail().
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minitron_mp.distillation.stream_layout import Grid, Message, StreamShape, Traffic, messages

STREAM_VERSION = 2
"""Of messages() and of what travels with them; both ends must have the same."""

ANNOUNCE, CREDIT, DATA = 1, 2, 3
"""Tags; gloo matches by them, NCCL ignores them."""

NONE = -1
"""Announced in the place of a microbatch: no further one comes."""


class StreamError(RuntimeError):
    """The stream broke; names the rank at the other end."""


@dataclass
class Link:
    """What both ends share. bridge: parallel.Bridge of this rank; window: microbatches in flight a teacher replica.

    stage: of the students, that receives. Two ranks share one link at most, so that order says which message is whose.
    """

    bridge: Any
    shape: StreamShape
    teacher: Grid
    students: Sequence[Grid]
    window: int
    stage: int = -1
    bytes_moved: int = 0
    wait_s: float = 0.0
    """For which the student's host waited for signals."""

    def blocks(self, id: int, student: Grid) -> tuple[Message, ...]:
        return messages(self.shape, self.teacher, student, id % self.teacher.dp, id % student.dp, self.stage)

    def to_stages(self, blocks: Mapping[int, Sequence[int]]) -> dict[int, Link]:
        """Stage -> its link, where each stage receives some blocks of the width of this link's payload."""
        return {
            stage: replace(self, stage=stage, shape=replace(self.shape, width=len(own) * self.shape.width))
            for stage, own in blocks.items()
        }

    def fail(self, rank: int, what: str, error: BaseException | None = None) -> StreamError:
        """The error of this rank's wait for another: names the rank at the end of the chain of waits.

        When a wait ends, gloo closes every connection, so all ranks that wait come here at about the same time. Each says for whom
        it waits; a rank that says nothing is dead or hangs.
        """
        bridge = self.bridge
        cause = (
            f" ({str(error).splitlines()[0].split('] ')[-1].split('. ')[0]})"
            if error is not None and str(error)
            else ""
        )
        text = f"{self.describe(rank)} {what}{cause}"
        blame = bridge.blame(rank, text) if error is not None else text
        return StreamError(bridge.reason() or bridge.report(blame))

    def describe(self, rank: int) -> str:
        """Role and place of a job rank."""
        return next(g for g in (self.teacher, *self.students) if g.first <= rank < g.first + g.size).describe(
            rank
        )


class Sender:
    """The teacher's end, on one rank of its last stage. Holds at most `window` microbatches that some student has not consumed."""

    def __init__(self, link: Link):
        self.link = link
        self.flying: deque[tuple[int, dict[int, tuple[Any, Tensor]], list[Any]]] = (
            deque()
        )  # id, credits that are owed, sends under way
        self.most_in_flight = 0
        self.said: list[Any] = []

    def make_room(self, count: int = 1) -> None:
        """Wait until `count` more microbatches may be in flight."""
        assert count <= self.link.window, f"{count} microbatches at once in a window of {self.link.window}"
        while len(self.flying) > self.link.window - count:
            self._land()

    def send(self, id: int, signal: Tensor) -> None:
        """signal [s', b, n'] of this rank, contiguous; may be overwritten when its credits are there."""
        link, rank = self.link, self.link.bridge.rank
        assert len(self.flying) < link.window, "make_room() first"
        blocks = [
            block for student in link.students for block in link.blocks(id, student) if block.source == rank
        ]
        works: list[Any] = []
        # Announced when it is there: the student then posts its receive, and an NCCL kernel that waits for this rank's forward pass
        # would take processors from the student's.
        link.bridge.computed()
        credits: dict[int, tuple[Any, Tensor]] = {}
        for target in dict.fromkeys(block.target for block in blocks):
            number = torch.tensor([id])
            works.append((link.bridge.control.send([number], target, ANNOUNCE), number))
            credit = torch.empty(1, dtype=torch.int64)
            credits[target] = link.bridge.control.recv([credit], target, CREDIT), credit
        with link.bridge.stream():
            link.bridge.used_by_stream(signal)
            for block in blocks:
                part = signal[block.source_rows, :, block.source_columns].contiguous()
                works.append((link.bridge.data.send([part], block.target, DATA), part))
                link.bytes_moved += part.nbytes
        self.flying.append((id, credits, works))
        self.most_in_flight = max(self.most_in_flight, len(self.flying))

    def finish(self) -> None:
        """Wait until everything sent is consumed."""
        while self.flying:
            self._land()

    def end(self, first: int, last: int) -> None:
        """No id from `first` to `last` will come: each receiver hears it from the rank to which it listens for its next one."""
        link = self.link
        for student in link.students:
            for id in range(first, min(first + student.dp, last)):  # one of each replica
                next_source: dict[int, int] = {}
                for block in link.blocks(id, student):
                    next_source.setdefault(block.target, block.source)
                for target, source in next_source.items():
                    if source == link.bridge.rank:
                        number = torch.tensor([NONE])
                        # Kept, not waited for: a receiver that is closed already does not listen.
                        self.said.append((link.bridge.control.send([number], target, ANNOUNCE), number))

    def _land(self) -> None:
        id, credits, works = self.flying[0]
        for target, (work, credit) in credits.items():
            try:
                work.wait(self.link.bridge.timeout)
            except RuntimeError as error:
                raise self.link.fail(target, f"did not consume microbatch {id}", error) from error
            if credit.item() != id:
                raise self.link.fail(target, f"consumed microbatch {credit.item()}, microbatch {id} was due")
        for work, _ in works:
            work.wait(self.link.bridge.timeout)
        self.flying.popleft()


class Senders:
    """In the place of one Sender, to several stages: each gets its blocks of `width` columns of the signal."""

    def __init__(self, links: Mapping[int, Link], blocks: Mapping[int, Sequence[int]], width: int):
        self.width = width
        self.parts = [(Sender(link), blocks[stage]) for stage, link in links.items()]

    def make_room(self, count: int = 1) -> None:
        for sender, _ in self.parts:
            sender.make_room(count)

    def send(self, id: int, signal: Tensor) -> None:
        """signal [s', b, width x all blocks] of this rank."""
        blocks = signal.split(self.width, -1)
        for sender, own in self.parts:
            sender.send(id, torch.cat([blocks[number] for number in own], -1))

    def finish(self) -> None:
        for sender, _ in self.parts:
            sender.finish()

    def end(self, first: int, last: int) -> None:
        for sender, _ in self.parts:
            sender.end(first, last)


class _Broken(Exception):
    """What the listening thread found: the job rank at the other end, and what it did."""

    def __init__(self, rank: int, what: str):
        super().__init__(rank, what)
        self.rank, self.what = rank, what


@dataclass
class _Arrival:
    signal: Tensor
    event: Any = None


class Receiver:
    """The student's end, on one rank of its last stage: get(id) and release(id) in ascending order of `ids`.

    A thread listens, so that transfers go on while the student computes.
    """

    def __init__(self, link: Link, student: Grid, ids: Sequence[int], device: torch.device):
        self.link, self.student, self.ids, self.device = link, student, ids, device
        self.arrived: dict[int, _Arrival] = {}
        self.credit = {
            dp: link.window for dp in range(link.teacher.dp)
        }  # microbatches that a teacher replica may have in flight
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.closed = False
        self.thread = threading.Thread(target=self._listen, name="teacher stream", daemon=True)
        self.thread.start()

    def get(self, id: int) -> Tensor:
        """[s', b, n'] of this rank; waits for it."""
        start = time.perf_counter()
        with self.changed:
            self.changed.wait_for(lambda: id in self.arrived or self.failure is not None)
            arrival = self.arrived.pop(id, None)  # the thread's waits are bounded, so this one is
        self.link.wait_s += time.perf_counter() - start
        if arrival is None:
            # Only now does this rank wait for the other: before, the thread was ahead of it.
            error = self.failure
            raise (
                self.link.fail(error.rank, error.what, error.__cause__)
                if isinstance(error, _Broken)
                else RuntimeError(str(error))
            ) from error
        if arrival.event is not None:
            torch.cuda.current_stream().wait_event(arrival.event)
            arrival.signal.record_stream(torch.cuda.current_stream())
        return arrival.signal

    def release(self, id: int) -> None:
        """The signal is used, or held by another: let the teacher send one more."""
        link = self.link
        for source in dict.fromkeys(block.source for block in self._blocks(id)):
            try:
                link.bridge.control.send([torch.tensor([id])], source, CREDIT).wait(link.bridge.timeout)
            except RuntimeError as error:
                raise link.fail(source, f"did not take the credit for microbatch {id}", error) from error
        with self.changed:
            self.credit[id % link.teacher.dp] += 1
            self.changed.notify_all()

    def traffic(self) -> Traffic:
        """Return the time that this rank has waited, and the bytes that it has received, so far."""
        return Traffic(self.link.wait_s, self.link.bytes_moved)

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join()

    def _blocks(self, id: int) -> list[Message]:
        return [
            block for block in self.link.blocks(id, self.student) if block.target == self.link.bridge.rank
        ]

    def _listen(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a thread starts on the first GPU
        try:
            for id in self.ids:
                replica = id % self.link.teacher.dp
                with self.changed:
                    # Not before the teacher may send it: then the wait below is for the teacher alone, however long this side pauses.
                    while self.credit[replica] == 0 and not self.closed:
                        self.changed.wait()
                    if self.closed:
                        return
                    self.credit[replica] -= 1
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

    def _receive(self, id: int) -> _Arrival | None:
        """None: it will not come, the stream ends here."""
        link, shape = self.link, self.link.shape
        bridge, blocks = link.bridge, self._blocks(id)
        for source in dict.fromkeys(block.source for block in blocks):
            number = torch.empty(1, dtype=torch.int64)
            try:
                bridge.control.recv([number], source, ANNOUNCE).wait(bridge.timeout)
            except RuntimeError as error:
                raise _Broken(source, f"did not announce microbatch {id}") from error
            if number.item() == NONE:
                return None
            if number.item() != id:
                raise _Broken(source, f"announced microbatch {number.item()}, microbatch {id} was due")
        with bridge.stream(
            behind_current=False
        ):  # the buffer is new, the student's work no concern of the transfer
            signal = torch.empty(shape.local(self.student.parallel), dtype=shape.dtype, device=self.device)
            parts = []
            for block in blocks:
                view = signal[block.target_rows, :, block.target_columns]
                part = (
                    view
                    if view.is_contiguous()
                    else torch.empty(view.shape, dtype=view.dtype, device=view.device)
                )
                parts.append((bridge.data.recv([part], block.source, DATA), block, view, part))
                link.bytes_moved += part.nbytes
            for work, block, view, part in parts:
                try:
                    work.wait(bridge.timeout)
                except RuntimeError as error:
                    raise _Broken(block.source, f"stopped in the middle of microbatch {id}") from error
                if part is not view:
                    view.copy_(part)
            return _Arrival(signal, bridge.record_event())
