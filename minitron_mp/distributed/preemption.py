"""Preemption: stop early with a checkpoint, near a deadline, for a stop file, or after SIGTERM.

Each rank records only its local stop requests. The training loop adds them up in the collective of
each log interval. So all ranks of a role stop after the same step, without extra communication.
distillation/stream_end.py stops a remote teacher and its students after the same step.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from minitron_mp.console import speaks
from minitron_mp.distributed.job import STOP_FILE
from minitron_mp.distributed.launcher import job_deadline
from minitron_mp.distributed.process_groups import host_group

OTHER_RANK = "stop requested on another rank"
"""Reason on a rank without a local stop request."""


class Preempted(Exception):
    """Raised on all ranks when the job stops early, after its state is saved.

    The text has the step or stage, and the reason.
    """


@dataclass
class Preemption:
    """The stop requests of this rank, and measured times for a stop before the deadline.

    output: folder that may contain a stop file. deadline: time in seconds since 1970 at which the
    process must have ended.
    """

    output: Path
    deadline: float | None = None
    sigterm: bool = False
    """Whether this process has received SIGTERM."""
    interrupted: bool = False
    """Whether this process has received SIGINT (Ctrl-C)."""
    roles_met: bool = False
    """Whether the roles of the job have exchanged which students run `distill`. A role that stops
    earlier must still take part in that exchange."""
    checkpoint_s: dict[Path, float] = field(default_factory=dict)
    """Checkpoint folder of each active run -> seconds of its slowest checkpoint, with commit."""
    step_s: deque[float] = field(default_factory=lambda: deque(maxlen=8))
    """Seconds per step in the last logged intervals."""

    @property
    def was_signalled(self) -> bool:
        """Whether this process has received SIGTERM or Ctrl-C."""
        return self.sigterm or self.interrupted

    @property
    def stop_file(self) -> Path:
        return self.output / STOP_FILE

    def stop_request(
        self, is_main: bool, *, steps: int = 0, checkpoints: int = 1, validation_s: float = 0.0
    ) -> str:
        """Return the reason to stop on this rank, or "" to continue. It does not communicate.

        Only the main rank checks the stop file and the deadline. steps: number of steps until the
        next possible stop. checkpoints: number of checkpoints to write before the process can end.
        validation_s: seconds of the validations in these steps.
        """
        if self.sigterm:
            return "SIGTERM"
        if self.interrupted:
            return "Ctrl-C"
        if not is_main:
            return ""
        if self.stop_file.exists():
            return f"stop file {self.stop_file} exists"
        if self.deadline is None:
            return ""
        needed_s = steps * max(self.step_s, default=0.0) + checkpoints * sum(self.checkpoint_s.values())
        needed_s += validation_s
        left_s = self.deadline - time.time()
        if left_s > needed_s:
            return ""
        work = f"{steps} steps{', a validation' if validation_s else ''} and a checkpoint"
        return f"{max(0.0, left_s):.0f} s to the deadline, {work} need {needed_s:.0f} s"

    def raise_if_requested(self, where: str, is_main: bool) -> None:
        """Raise Preempted on all ranks when any rank has a stop request.

        where: text for the message, such as "before distill". Reached by all ranks, between stages.
        """
        reason = self.stop_request(is_main)
        requests = torch.tensor(float(bool(reason)))
        dist.all_reduce(requests, group=host_group())
        if requests.item():
            raise Preempted(f"stopped {where} ({reason or OTHER_RANK})")

    def needs_checkpoint_time(self, checkpoints: Path) -> bool:
        """Return whether a deadline exists but the checkpoint time of this run is not known."""
        return self.deadline is not None and checkpoints not in self.checkpoint_s

    def record_checkpoint(self, checkpoints: Path, seconds: float) -> None:
        """Record the time of a checkpoint of a run. Only the longest time is kept."""
        self.checkpoint_s[checkpoints] = max(seconds, self.checkpoint_s.get(checkpoints, 0.0))

    def end_run(self, checkpoints: Path | None) -> None:
        """Delete the times of a finished run."""
        if checkpoints is not None:
            self.checkpoint_s.pop(checkpoints, None)
        self.step_s.clear()


@contextmanager
def watch_for_preemption(output: Path) -> Iterator[Preemption]:
    """Yield the Preemption of this process. It records SIGTERM and Ctrl-C until the context ends.

    The second Ctrl-C raises KeyboardInterrupt. The first one does not, because Python drops an
    exception that a signal raises while a process is forked, and then one rank would continue alone.
    Python handles signals in the main thread only. In another thread they are not recorded.
    """
    preemption = Preemption(output, job_deadline())
    if threading.current_thread() is not threading.main_thread():
        yield preemption
        return

    def record(number: int, frame: FrameType | None) -> None:
        preemption.sigterm = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        if preemption.interrupted:
            raise KeyboardInterrupt
        preemption.interrupted = True
        if speaks():  # print() may be interrupted in the middle of a line
            os.write(2, b"Ctrl-C: stops at the next step or stage; once more: stops at once\n")

    handlers = {signal.SIGTERM: record}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a background job of a shell ignores it
        handlers[signal.SIGINT] = interrupt
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield preemption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
