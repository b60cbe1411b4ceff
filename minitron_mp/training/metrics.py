"""Metrics of a training run: one StepMetrics per optimizer step, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from minitron_mp.artifacts.files import write_text
from minitron_mp.distributed.world import World
from minitron_mp.training.throughput import Throughput

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Loss is what was optimised; loss, kl and ce are means over the step's valid tokens, in nats.
    """

    step: int
    """From 1."""
    loss: float
    kl: float
    ce: float
    grad_norm: float
    """Before clipping."""
    lr: float
    num_tokens: int
    """Valid tokens over all ranks."""
    step_time_s: float
    tokens_per_s: float
    states: float | None = None
    """Loss on hidden states (distillation/hidden_states.py), where they are matched."""
    alpha: float | None = None
    """Its weight in the loss."""
    measured: Throughput = field(default_factory=Throughput, compare=False)

    def values(self) -> dict[str, float]:
        """Return name -> value of every metric that this run has, without nesting."""
        own = {name: value for name, value in vars(self).items() if name != "measured"}
        return {name: value for name, value in {**own, **vars(self.measured)}.items() if value is not None}

    def console_line(self) -> str:
        """Return the metrics that fit on a line of the console."""
        return (
            f"loss {self.loss:.4f}  lr {self.lr:.2e}  grad norm {self.grad_norm:.2f}  "
            f"{self.tokens_per_s:,.0f} tokens/s  {self.measured.console_line()}"
        )


def metrics_line(metrics: StepMetrics) -> str:
    """Return one line of metrics.jsonl."""
    return json.dumps({**metrics.values(), "time": time.time()})


class MetricsLog:
    """Writes metrics.jsonl and TensorBoard scalars on rank 0.

    A context manager that yields the writer.

    name: of the run, prefix of its TensorBoard tags. first_step: from which the run resumes. What
    was logged after it is removed, because the run repeats these steps.
    """

    def __init__(self, path: Path, name: str, first_step: int, world: World):
        self.path, self.name, self.first_step, self.enabled = path, name, first_step, world.is_main
        self.file: TextIO | None = None
        self.board: SummaryWriter | None = None

    def __enter__(self) -> Callable[[StepMetrics], None]:
        if self.enabled:
            from torch.utils.tensorboard import SummaryWriter

            write_text(self.path, "".join(self._lines_to_keep()))
            self.file = self.path.open("a", buffering=1)
            folder = self.path.with_name("tensorboard") / self.name
            self.board = SummaryWriter(str(folder), purge_step=self.first_step + 1)
        return self._write

    def _lines_to_keep(self) -> list[str]:
        """Return the complete lines of the steps before the one that the run resumes from."""
        if not self.first_step or not self.path.exists():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        return [
            line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= self.first_step
        ]

    def _write(self, metrics: StepMetrics) -> None:
        assert self.file is not None
        assert self.board is not None
        self.file.write(metrics_line(metrics) + "\n")
        for name, value in metrics.values().items():
            if name != "step":
                self.board.add_scalar(f"{self.name}/{name}", value, metrics.step)
        # Without a flush a kill loses up to two minutes of points, which a resumed run does not
        # repeat when they are older than its checkpoint.
        self.board.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is not None and self.board is not None:
            self.file.close()
            self.board.close()
