"""The stages that train: correct and distill. Their curves, logs and checkpoints lie beside the artefacts until those are whole."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_mp.artifacts.files import write_text
from minitron_mp.distributed.world import World
from minitron_mp.training.throughput import Throughput


class MetricsLog:
    """metrics.jsonl and TensorBoard scalars, on rank 0; takes back what was logged after the step that a run resumes from."""

    def __init__(self, path: Path, name: str, first: int, world: World):
        self.path, self.name, self.first, self.enabled = path, name, first, world.is_main

    def __enter__(self) -> Callable[[StepMetrics], None]:
        if self.enabled:
            from torch.utils.tensorboard import SummaryWriter

            lines = (
                self.path.read_text().splitlines(keepends=True) if self.path.exists() and self.first else []
            )
            write_text(
                self.path,
                "".join(
                    line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= self.first
                ),
            )
            self.file = self.path.open("a", buffering=1)
            self.board = SummaryWriter(
                str(self.path.with_name("tensorboard") / self.name), purge_step=self.first + 1
            )
        return self._write

    def _write(self, metrics: StepMetrics) -> None:
        self.file.write(metrics_line(metrics) + "\n")
        for name, value in metrics.given().items():
            if name != "step":
                self.board.add_scalar(f"{self.name}/{name}", value, metrics.step)
        self.board.flush()  # or a kill takes up to two minutes of points, and a resumed run does not repeat those before its checkpoint

    def __exit__(self, *_: Any) -> None:
        if self.enabled:
            self.file.close()
            self.board.close()


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. loss is what was optimised; it, kl and ce are means over the step's valid tokens, in nats."""

    step: int
    loss: float
    kl: float
    ce: float
    grad_norm: float
    lr: float
    num_tokens: int
    step_time_s: float
    tokens_per_s: float
    states: float | None = None
    """L_is and its weight in the loss (states.py), where states are matched."""
    alpha: float | None = None
    measured: Throughput = field(default_factory=Throughput, compare=False)

    def given(self) -> dict[str, float]:
        """Name -> value, of what there is."""
        rows = {name: value for name, value in vars(self).items() if name != "measured"} | vars(self.measured)
        return {name: value for name, value in rows.items() if value is not None}


def metrics_line(metrics: StepMetrics) -> str:
    """One line of metrics.jsonl."""
    return json.dumps({**metrics.given(), "time": time.time()})
