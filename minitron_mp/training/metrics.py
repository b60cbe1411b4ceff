"""Metrics of a training run: one StepMetrics per optimizer step, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from minitron_mp.artifacts.files import write_text
from minitron_mp.console import say
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError, os_error_text
from minitron_mp.training.spikes import WINDOW, SpikeWatch
from minitron_mp.training.throughput import Throughput

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one optimizer step.

    loss is the optimised value. loss, divergence and ce are means over the step's valid tokens, in
    nats.
    """

    step: int
    """Number of the step, counted from 1."""
    loss: float
    divergence: float | None
    """Divergence of the loss between teacher and student, without weight and temperature squared.
    None without a teacher."""
    ce: float
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    num_tokens: int
    """Valid tokens over all ranks."""
    step_time_s: float
    tokens_per_s: float
    states: float | None = None
    """Loss on hidden states (distillation/hidden_states.py). None if they are not matched."""
    alpha: float | None = None
    """Weight of `states` in the loss."""
    valid_loss: float | None = None
    """Cross-entropy on held-out text. None: the step was not validated."""
    valid_kl: float | None = None
    """KL(teacher || model) on held-out text. None also without a teacher on these ranks."""
    num_skipped: int | None = None
    """Steps without an update so far, because their gradient or loss was not finite. None: no such
    step."""
    divergence_name: str = ""
    """Name of the divergence: config.distillation.DistillConfig.divergence. "" without a teacher."""
    measured: Throughput = field(default_factory=Throughput, compare=False)

    def values(self) -> dict[str, float]:
        """Return name -> value of every metric that is finite, in one flat dictionary.

        The divergence has its own name: "forward_kl", "js". So curves of different divergences do
        not get one name, and none is mistaken for the KL of an evaluation.
        """
        metrics = {
            self.divergence_name if name == "divergence" else name: value
            for name, value in vars(self).items()
            if name not in ("divergence_name", "measured")
        }
        metrics |= vars(self.measured)
        return {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}

    def console_line(self) -> str:
        """Return the metrics that fit on a line of the console."""
        return (
            f"loss {self.loss:.4f}  lr {self.lr:.2e}  grad norm {self.grad_norm:.2f}  "
            f"{self.tokens_per_s:,.0f} tokens/s  {self.measured.console_line()}"
        )


def metrics_line(metrics: StepMetrics, spike_over: float | None = None) -> str:
    """Return one line of metrics.jsonl. spike_over: median of the steps before a loss spike."""
    spike = {} if spike_over is None else {"spike_over": spike_over}
    return json.dumps({**metrics.values(), **spike, "time": time.time()})


BOARD_FLUSH_S = 1
"""Seconds after which a thread of TensorBoard writes its points to disk. A kill loses the points of
this time, and a resumed run does not repeat those from before its checkpoint. A flush after each step
would keep the other ranks waiting in the next collective."""

BOARD_QUEUE = 10_000
"""Points that wait for that thread before a step waits for it."""


class MetricsLog:
    """Context manager that yields the writer of metrics.jsonl and TensorBoard scalars, on rank 0.

    name: name of the run and prefix of its TensorBoard tags. first_step: step from which the run
    resumes. Metrics of later steps are deleted, because the run repeats these steps.
    """

    def __init__(self, path: Path, name: str, first_step: int, world: World):
        self.path, self.name, self.first_step, self.enabled = path, name, first_step, world.is_main
        self.board_folder = path.with_name("tensorboard") / name
        self.file: TextIO | None = None
        self.board: SummaryWriter | None = None
        self.spikes = SpikeWatch()

    def __enter__(self) -> Callable[[StepMetrics], None]:
        if self.enabled:
            from torch.utils.tensorboard import SummaryWriter

            kept = self._lines_to_keep()
            self.spikes = SpikeWatch(json.loads(line).get("loss", math.nan) for line in kept)
            write_text(self.path, "".join(kept))
            self.file = self.path.open("a", buffering=1, encoding="utf-8")
            self.board = SummaryWriter(
                str(self.board_folder),
                purge_step=self.first_step + 1,
                max_queue=BOARD_QUEUE,
                flush_secs=BOARD_FLUSH_S,
            )
        return self._write

    def _lines_to_keep(self) -> list[str]:
        """Return the complete lines of the steps up to first_step."""
        if not self.first_step or not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [
            line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= self.first_step
        ]

    def _write(self, metrics: StepMetrics) -> None:
        assert self.file is not None
        assert self.board is not None
        if not metrics.num_tokens:
            say(f"{self.name}: step {metrics.step} has no token that counts in the loss, so it has no loss")
        spike_over = self.spikes.add(metrics.loss)
        if spike_over is not None:
            say(
                f"{self.name}: loss spike: {metrics.loss:.4f} at step {metrics.step}, the median of the last "
                f"{WINDOW} steps is {spike_over:.4f}"
            )
        try:
            self.file.write(metrics_line(metrics, spike_over) + "\n")
            for name, value in metrics.values().items():
                if name != "step":
                    self.board.add_scalar(f"{self.name}/{name}", value, metrics.step)
        except OSError as error:
            raise InputError(
                f"{self.path} or {self.board_folder} cannot be written: {os_error_text(error)}"
            ) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is None or self.board is None:
            return
        try:
            self.file.close()
            self.board.close()
        except OSError as failure:
            if error is None:  # otherwise this is a consequence of that error
                raise InputError(f"{self.path} cannot be written: {os_error_text(failure)}") from failure
