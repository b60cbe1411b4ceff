"""RunOptions: checkpoints, seed and callbacks of a training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.throughput import StepWork
from minitron_mp.training.validation import Measure


class Stateful(Protocol):
    """An object with sharded state in the checkpoints of a run.

    All ranks must call both methods.
    """

    def state_dict(self, *, empty: bool = False) -> dict[str, Any]:
        """Return the sharded state. empty: uninitialised tensors, to read a checkpoint into."""

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Restore a state_dict(empty=True) that a checkpoint has filled."""


def ignore_metrics(metrics: StepMetrics) -> None:
    """Do nothing; the default of on_step."""


@dataclass(frozen=True)
class RunOptions:
    """Options of a training run besides model, teacher and hyperparameters.

    checkpoints: folder of its checkpoints. None: a different run saves its state.
    manifest: manifest of the artifact that the run makes. A run never resumes from a checkpoint
        with a different manifest.
    seed: seed and step number determine the random streams of a step.
    on_step: called on rank 0 for each step, at the end of every log interval.
    extra_state: a second object whose state is saved and restored with the run.
    work: FLOPs of a step, for the metrics.
    measure: measures the model on held-out text every settings.valid_interval steps. None: no
        validation.
    """

    checkpoints: Path | None
    manifest: Manifest
    seed: int = 1
    on_step: Callable[[StepMetrics], None] = ignore_metrics
    extra_state: Stateful | None = None
    work: StepWork | None = None
    measure: Measure | None = None
