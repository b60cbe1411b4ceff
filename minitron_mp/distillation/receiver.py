"""Receiver: the student's end of a teacher stream. stream.py describes the protocol."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_mp.distillation.stream import ANNOUNCE, CREDIT, DATA, END_OF_STREAM, Link, StreamError
from minitron_mp.distillation.stream_layout import Grid, Message, Traffic


class _Ended(Exception):
    """The teacher has ended the stream. It is an error only if the student needs a later signal."""


class _Broken(Exception):
    """A failure in the listening thread. rank: job rank at the other end. what: its error."""

    def __init__(self, rank: int, what: str):
        super().__init__(rank, what)
        self.rank, self.what = rank, what


@dataclass
class _Arrival:
    """A received signal. event: the end of its transfer on a GPU."""

    signal: Tensor
    event: torch.cuda.Event | None = None


class Receiver:
    """The student's end, on one rank of a stage.

    Call get(id) and release(id) in ascending order of `ids`. A thread receives the signals, so
    transfers continue while the student computes.
    """

    def __init__(self, link: Link, student: Grid, ids: Sequence[int], device: torch.device):
        self.link, self.student, self.ids, self.device = link, student, ids, device
        self.arrived: dict[int, _Arrival] = {}
        self.credits = dict.fromkeys(range(link.teacher.dp), link.window)
        """Teacher replica -> number of further microbatches that it may send."""
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.closed = False
        self.thread = threading.Thread(target=self._listen, name="teacher stream", daemon=True)
        self.thread.start()

    def get(self, id: int) -> Tensor:
        """Wait for a microbatch and return this rank's part [s', b, n']."""
        start = time.perf_counter()
        limit_s = self._longest_wait_s(id)
        with self.changed:
            # The waits of the thread have the timeout, and the thread sets `failure` when it ends
            # early. The limit is for calls of NCCL that do not return.
            in_time = self.changed.wait_for(
                lambda: id in self.arrived or self.failure is not None, timeout=limit_s
            )
            arrival = self.arrived.pop(id, None)
        self.link.wait_s += time.perf_counter() - start
        if not in_time:
            source = self._blocks(id)[0].source
            raise self.link.error(source, f"did not send microbatch {id} in {limit_s:.0f} s")
        if arrival is None:
            failure = self.failure
            if isinstance(failure, _Ended):
                raise StreamError(f"the teacher ended the stream before microbatch {id}")
            if not isinstance(failure, _Broken):
                raise RuntimeError(str(failure)) from failure
            # The thread runs ahead of the student, so its failure is raised only when the student
            # needs the signal.
            raise self.link.error(failure.rank, failure.what, failure.__cause__) from failure
        if arrival.event is not None:
            torch.cuda.current_stream().wait_event(arrival.event)
            arrival.signal.record_stream(torch.cuda.current_stream())
        return arrival.signal

    def release(self, id: int) -> None:
        """Let the teacher send one more microbatch. The caller has used or stored the signal."""
        link, channel = self.link, self.link.channel
        for source in dict.fromkeys(block.source for block in self._blocks(id)):
            with link.naming(source, f"did not take the credit for microbatch {id}"):
                channel.control.send([torch.tensor([id])], source, CREDIT).wait(channel.timeout)
        with self.changed:
            self.credits[id % link.teacher.dp] += 1
            self.changed.notify_all()

    def traffic(self) -> Traffic:
        """Return the seconds that this rank has waited and the bytes that it has received."""
        return Traffic(self.link.wait_s, self.link.num_bytes)

    def close(self) -> None:
        """Stop listening.

        After the last signal of a stream that ends early, it waits for the end of the stream.
        """
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join(self._longest_wait_s(self.ids[-1]) if self.ids else None)

    def _longest_wait_s(self, id: int) -> float:
        """Return the seconds that the thread needs at most for a microbatch after its credit.

        It waits for one announcement of each source, and for each block.
        """
        blocks = self._blocks(id)
        num_waits = len({block.source for block in blocks}) + len(blocks)
        return (num_waits + 1) * self.link.channel.timeout.total_seconds()

    def _blocks(self, id: int) -> list[Message]:
        rank = self.link.channel.rank
        return [block for block in self.link.messages(id, self.student) if block.target == rank]

    def _listen(self) -> None:
        """Receive all microbatches. It is the function of the thread."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a new thread starts with the first GPU
        try:
            for id in self.ids:
                if not self._take_credit(id % self.link.teacher.dp):
                    return
                arrival = self._receive(id)
                if arrival is None:
                    self._fail(_Ended())
                    return
                with self.changed:
                    self.arrived[id] = arrival
                    self.changed.notify_all()
        except BaseException as error:
            self._fail(error)

    def _fail(self, failure: BaseException) -> None:
        with self.changed:
            self.failure = failure
            self.changed.notify_all()

    def _take_credit(self, replica: int) -> bool:
        """Wait until a teacher replica may send. Return False if the receiver is closed.

        The timeout of the next announcement then starts after this wait. So a long pause of the
        student causes no timeout.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.credits[replica] > 0 or self.closed)
            # A closed receiver that has consumed all signals has credits, so it still receives the
            # end of the stream, for which the sender waits.
            if not self.credits[replica]:
                return False
            self.credits[replica] -= 1
            return True

    def _receive(self, id: int) -> _Arrival | None:
        """Receive a microbatch and return it, or None at the end of the stream."""
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
        # The buffer is new, so the transfer need not wait for earlier work.
        with channel.transfer_stream(behind_current=False):
            signal = torch.empty(shape.local(self.student.parallel), dtype=shape.dtype, device=self.device)
            parts = []
            for block in blocks:
                view = signal[block.target_rows, :, block.target_columns]
                part = view
                if not view.is_contiguous():
                    part = torch.empty_like(view, memory_format=torch.contiguous_format)
                try:
                    work = channel.data.recv([part], block.source, DATA)
                except RuntimeError as error:
                    raise _Broken(block.source, f"did not send microbatch {id}") from error
                parts.append((work, block, view, part))
                self.link.num_bytes += part.nbytes
            for work, block, view, part in parts:
                try:
                    work.wait(channel.timeout)
                except RuntimeError as error:
                    raise _Broken(block.source, f"stopped in the middle of microbatch {id}") from error
                if part is not view:
                    view.copy_(part)
            return _Arrival(signal, channel.record_event())
