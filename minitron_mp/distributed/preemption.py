"""Preemption: stop early with a checkpoint, near a deadline, for a stop file, or after SIGTERM.

Each rank only records the requests that it receives. The training loop adds them up in the
collective that it makes anyway at each log interval, so all ranks of a role learn of a request at
the same step, without extra communication. distillation/stream_end.py stops a remote teacher and
its students at the same step.
"""

from __future__ import annotations

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

from minitron_mp.distributed.launcher import job_deadline

STOP_FILE = "stop"
"""Name of the file in the output folder that asks the job to stop. The job deletes it when it
stops.
"""

OTHER_RANK = "stop requested on another rank"
"""Reason on a rank that received no stop request itself."""


class Preempted(Exception):
    """All ranks stop early, and everything is saved.

    The text says after which step or stage, and why.
    """


@dataclass
class Preemption:
    """The stop requests of this rank, and the times that decide when to stop for a deadline.

    output: folder that may contain a stop file. deadline: seconds since 1970 by which the process
    must end.
    """

    output: Path
    deadline: float | None = None
    sigterm: bool = False
    """Whether this process has received SIGTERM."""
    roles_met: bool = False
    """Whether the roles of the job have exchanged which students run `distill`. A role that stops
    before must still take part in that exchange."""
    checkpoint_s: dict[Path, float] = field(default_factory=dict)
    """Checkpoint folder of each run in progress -> seconds that its slowest checkpoint took until
    committed.
    """
    step_s: deque[float] = field(default_factory=lambda: deque(maxlen=8))
    """Seconds per step in the last logged intervals."""

    @property
    def stop_file(self) -> Path:
        return self.output / STOP_FILE

    def stop_request(self, is_main: bool, *, steps: int = 0, checkpoints: int = 1) -> str:
        """Return why this rank asks to stop, "" when it does not; no communication.

        Only the main rank looks at stop file and clock. steps: steps until the next chance to stop.
        checkpoints: checkpoints that have to be written before the process can end.
        """
        if self.sigterm:
            return "SIGTERM"
        if not is_main:
            return ""
        if self.stop_file.exists():
            return f"stop file {self.stop_file} exists"
        if self.deadline is None:
            return ""
        needed_s = steps * max(self.step_s, default=0.0) + checkpoints * sum(self.checkpoint_s.values())
        left_s = self.deadline - time.time()
        if left_s > needed_s:
            return ""
        return (
            f"{max(0.0, left_s):.0f} s to the deadline, {steps} steps and a checkpoint need {needed_s:.0f} s"
        )

    def raise_if_requested(self, where: str, is_main: bool) -> None:
        """Raise Preempted on all ranks when any of them asks to stop.

        Between stages. Reached by all ranks.
        """
        reason = self.stop_request(is_main)
        requests = torch.tensor(float(bool(reason)))
        dist.all_reduce(requests)
        if requests.item():
            raise Preempted(f"stopped {where} ({reason or OTHER_RANK})")

    def needs_checkpoint_time(self, checkpoints: Path) -> bool:
        """Return whether a checkpoint of this run has to be timed to plan a stop."""
        return self.deadline is not None and checkpoints not in self.checkpoint_s

    def record_checkpoint(self, checkpoints: Path, seconds: float) -> None:
        """Keep the time of a run's slowest checkpoint."""
        self.checkpoint_s[checkpoints] = max(seconds, self.checkpoint_s.get(checkpoints, 0.0))

    def end_run(self, checkpoints: Path | None) -> None:
        """Forget the times of a run that is over."""
        if checkpoints is not None:
            self.checkpoint_s.pop(checkpoints, None)
        self.step_s.clear()


@contextmanager
def watch_for_preemption(output: Path) -> Iterator[Preemption]:
    """Yield the Preemption of this process, and record SIGTERM in it while the context lasts.

    Python handles signals in the main thread only; in another thread SIGTERM is not recorded.
    """
    preemption = Preemption(output, job_deadline())
    if threading.current_thread() is not threading.main_thread():
        yield preemption
        return

    def record(number: int, frame: FrameType | None) -> None:
        preemption.sigterm = True

    previous = signal.signal(signal.SIGTERM, record)
    try:
        yield preemption
    finally:
        signal.signal(signal.SIGTERM, previous)
