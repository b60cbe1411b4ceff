"""RunOptions: what a training run needs beside its model, teacher and hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.throughput import StepWork


class Stateful(Protocol):
    """An object with sharded state in the checkpoints of a run.

    Both methods are reached by all ranks.
    """

    def state_dict(self, *, empty: bool = False) -> dict[str, Any]:
        """Return the sharded state; empty: uninitialised tensors to read a checkpoint into."""

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Continue from a state_dict(empty=True) that a checkpoint has filled."""


def ignore_metrics(metrics: StepMetrics) -> None:
    """Do nothing; the default of on_step."""


@dataclass(frozen=True)
class RunOptions:
    """Where a training run saves and reports.

    checkpoints: folder of its checkpoints. None: another run saves its state.
    manifest: of the artefact that the run makes. A checkpoint with another manifest is never
    resumed. seed: with the step number it gives the random streams of a step.
    on_step: called on rank 0 for each step, at the end of every log interval.
    extra_state: a second object whose state is saved and resumed with the run.
    work: FLOPs of a step, for the metrics.
    """

    checkpoints: Path | None
    manifest: Manifest
    seed: int = 1
    on_step: Callable[[StepMetrics], None] = ignore_metrics
    extra_state: Stateful | None = None
    work: StepWork | None = None
