"""Find a slow rank by the time of its forward passes.

In a synchronous job every rank has the same step time, because the fast ranks wait for the slow one
in the next collective. So the time of the model's forward passes is compared, which contain no
pipeline and no data-parallel communication. The ranks of one pipeline stage have equal work. Ranks
of one tensor-parallel or context-parallel group wait for each other in each layer, so a slow rank
slows its group, and one rank of the group is named.

Megatron-Core's StragglerDetector is not used: it needs a GPU and pynvml, opens a server on a port
of rank 0, compares ranks of all pipeline stages, and calls two more collectives and a
synchronisation for a report. The same CUDA events are used here, and read when the log has waited
for the device anyway.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from minitron_mp.console import say
from minitron_mp.distributed.process_groups import host_group
from minitron_mp.distributed.world import World

MIN_EXCESS_S = 0.05
"""A rank is not slow if it needs less than this more than the median, in seconds per step."""
REPORT_STEPS = 100
"""Steps between two lines about the same rank."""

clock = time.perf_counter


class ForwardTimer(AbstractContextManager[None]):
    """Context manager around each forward pass that adds up its time on the device of this rank."""

    def __init__(self, device: torch.device):
        self.has_events = device.type == "cuda"
        self.passes: list[tuple[Any, Any]] = []
        """Events at the begin and the end of each pass since take_s()."""
        self.spare: list[tuple[Any, Any]] = []
        self.seconds = 0.0
        self.begin = 0.0

    def __enter__(self) -> None:
        if not self.has_events:
            self.begin = clock()
            return
        if not self.spare:
            self.spare.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self.passes.append(self.spare.pop())
        self.passes[-1][0].record()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.has_events:
            self.passes[-1][1].record()
        else:
            self.seconds += clock() - self.begin

    def take_s(self) -> float:
        """Return the seconds since the last call. The device must have finished these passes."""
        seconds = self.seconds + sum(begin.elapsed_time(end) for begin, end in self.passes) / 1000
        self.spare += self.passes
        self.passes, self.seconds = [], 0.0
        return seconds


@dataclass(frozen=True)
class SlowestRank:
    """The rank whose forward passes take longest in relation to those of its pipeline stage.

    forward_s, median_s: seconds per step of this rank, and of the median rank of the stage.
    """

    rank: int
    forward_s: float
    median_s: float

    def is_slow(self, factor: float) -> bool:
        """Return whether the rank takes more than `factor` times the median."""
        excess = self.forward_s - self.median_s
        return self.forward_s > factor * self.median_s and excess >= MIN_EXCESS_S


def slowest_rank(forward_s: Sequence[float], num_stages: int) -> SlowestRank | None:
    """Return the slowest rank; None if no pipeline stage has two ranks.

    forward_s: seconds per step of each rank. Megatron's order of ranks has the pipeline stage as its
    slowest index. The median of an even number of ranks is the lower one, so that one of two ranks
    can be slow.
    """
    size = len(forward_s) // num_stages
    found = []
    for first in range(0, len(forward_s), size):
        stage = list(forward_s[first : first + size])
        median = sorted(stage)[(size - 1) // 2]
        if size > 1 and median > 0:
            slowest = max(range(size), key=stage.__getitem__)
            found.append(SlowestRank(first + slowest, stage[slowest], median))
    return max(found, key=lambda each: each.forward_s / each.median_s, default=None)


class StragglerWatch:
    """Logs a slow rank with its node. All ranks must call report() with equal values."""

    def __init__(self, world: World, factor: float, name: str):
        self.world, self.factor, self.name = world, factor, name
        self.last: tuple[int, int] | None = None
        """Rank and step of the last line."""

    def report(self, slowest: SlowestRank | None, step: int) -> None:
        """Log the rank if it is slow, and was not logged in the last REPORT_STEPS steps.

        step: last step of the log interval, from 1.
        """
        if slowest is None or not slowest.is_slow(self.factor):
            return
        if self.last and self.last[0] == slowest.rank and step < self.last[1] + REPORT_STEPS:
            return
        self.last = slowest.rank, step
        nodes: list[str] = [""] * self.world.size
        dist.all_gather_object(nodes, socket.gethostname(), group=host_group())
        say(
            f"{self.name}: slow rank: {self.world.coordinates_of(slowest.rank)} on {nodes[slowest.rank]}: "
            f"its forward passes take {slowest.forward_s:.3f} s per step at step {step}, the median of its "
            f"pipeline stage is {slowest.median_s:.3f} s"
        )
