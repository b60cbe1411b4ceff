"""Leaving before the end, with a checkpoint: near a deadline, for a stop file, after SIGTERM.

Each rank only notes what it sees. The trainer adds the wishes up in the collective that it makes anyway at each log interval, so all
ranks of a role know at the same step, and nothing is communicated for it alone.

A remote teacher runs ahead of its students, so it is the one to say where the stream ends (Ending):

    students  rank 0 of one that wants to leave asks for it in the job's store
    teacher   rank 0, before it starts a block of microbatches: the end is the first step boundary after the block's first microbatch.
              It says so in the store, then to its own ranks, and all of them serve up to there
    students  look into the store after each step, and leave after the step that was named

No student has done that step when the end is named: a microbatch of it is not computed yet. So no rank can miss it, and students of one
stream leave together.
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
from typing import Any

import torch
import torch.distributed as dist

from minitron_mp.distributed.launcher import job_deadline

STOP_FILE = "stop"
"""File in the output folder: leave at the next chance. Whoever obeys it deletes it."""


class Preempted(Exception):
    """All ranks leave before the end, and everything is saved; the text says where and why."""


@dataclass
class Preemption:
    """What this rank knows of leaving. output: folder that may get a stop file; deadline: seconds since 1970 by which the process should have ended."""

    output: Path
    deadline: float | None = None
    signalled: bool = False
    met: bool = False
    """Whether the roles of the job have met for distill; one that leaves before has to say so (pipeline.py)."""
    save_s: dict[Any, float] = field(default_factory=dict)
    """Seconds of the longest checkpoint of each run in progress, until it was whole."""
    step_s: deque[float] = field(default_factory=lambda: deque(maxlen=8))
    """Seconds a step in the last logged intervals."""

    def why(self, is_main: bool, *, steps: int = 0, saves: int = 1) -> str:
        """Why this rank wants to leave, "" when it does not; on the host alone. steps: that may pass before it can; saves: that are still to come."""
        if self.signalled:
            return "SIGTERM"
        if not is_main:
            return ""
        if self.stop_file.exists():
            return f"{self.stop_file} is there"
        needed = steps * max(self.step_s, default=0.0) + saves * sum(self.save_s.values())
        if self.deadline is not None and time.time() + needed >= self.deadline:
            return f"{max(0.0, self.deadline - time.time()):.0f} s are left to the deadline, {steps} steps and a checkpoint take {needed:.0f}"
        return ""

    def unmeasured(self, run: Any) -> bool:
        """Whether a checkpoint of this run has to be timed: without one nobody knows when to leave."""
        return self.deadline is not None and run not in self.save_s

    @property
    def stop_file(self) -> Path:
        return self.output / STOP_FILE

    def check(self, place: str, is_main: bool) -> None:
        """Left on all ranks when one of them wants to go now; between stages. Reached by all ranks."""
        why = self.why(is_main)
        wish = torch.tensor(float(bool(why)))
        dist.all_reduce(wish)
        if wish.item():
            raise Preempted(f"left {place}: {why or 'another rank was told to'}")


@contextmanager
def watch_for_preemption(output: Path) -> Iterator[Preemption]:
    """Leaving of this process; SIGTERM is noted in it as long as the context lasts, in the main thread (elsewhere Python lets nobody listen)."""
    own = Preemption(output, job_deadline())
    if threading.current_thread() is not threading.main_thread():
        yield own
        return

    def note(number: int, frame: Any) -> None:
        own.signalled = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield own
    finally:
        signal.signal(signal.SIGTERM, before)
