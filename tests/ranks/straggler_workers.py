"""What test_stragglers.py runs on ranks: training in which one rank is slow."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cases import CORRECT, Layout, settings
from megatron.core.transformer.transformer_layer import TransformerLayer
from model_workers import joined
from training_workers import Runner

from minitron_mp.console import speaks
from minitron_mp.models.arch import Arch
from minitron_mp.training import stragglers


def train_with_slow_rank(
    layout: Layout, arch: Arch, student: Path, output: Path, slow: int, log_interval: int
) -> tuple[list[dict[str, Any]], str, bool]:
    """Train while each layer takes 0.1 s of a virtual clock, and 0.2 s on one rank.

    Returns rank 0's metrics, what it prints, and whether coordinates_of() agrees with the groups.
    """
    now = [0.0]
    out = io.StringIO()
    with joined(layout) as world:
        layer_s = 0.2 if world.rank == slow else 0.1
        forward = TransformerLayer.forward

        def timed(layer: Any, *arguments: Any, **more: Any) -> Any:
            now[0] += layer_s
            return forward(layer, *arguments, **more)

        chosen = CORRECT.model_copy(
            update={
                "micro_batch_size": settings(layout).micro_batch_size,
                "steps": 4,
                "log_interval": log_interval,
            }
        )
        with (
            patch.object(TransformerLayer, "forward", timed),
            patch.object(stragglers, "clock", lambda: now[0]),
            contextlib.redirect_stdout(out),
        ):
            run = Runner(world, None, chosen)(arch, student, output)
        agrees = world.coordinates == world.coordinates_of(world.rank)
    return [metrics.values() for metrics in run.metrics], out.getvalue() if speaks() else "", agrees


def event_times(device: str) -> tuple[float, float, int]:
    """Return two intervals of a timer on a device whose events are counters, and its number of events."""
    ticks = [0]
    events = []

    class Event:
        def __init__(self, enable_timing: bool):
            events.append(self)

        def record(self) -> None:
            ticks[0] += 1
            self.at = ticks[0]

        def elapsed_time(self, end: Any) -> float:
            return 1000.0 * (end.at - self.at)

    with patch.object(torch.cuda, "Event", Event):
        timer = stragglers.ForwardTimer(torch.device(device))
        with timer:
            pass
        with timer:
            pass
        first = timer.take_s()
        with timer:
            ticks[0] += 4
        return first, timer.take_s(), len(events)
