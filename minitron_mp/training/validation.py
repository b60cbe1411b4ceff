"""Validation during training: the loss on held-out text, the best step, and the early stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from minitron_mp.artifacts.manifest import Validation
from minitron_mp.config.training import TrainingConfig
from minitron_mp.models.sharded_model import ShardedModel


class HeldOutLoss(Protocol):
    """Result of a measurement on held-out text: means over its valid tokens, in nats."""

    loss: float
    kl: float | None


Measure = Callable[[ShardedModel], HeldOutLoss]
"""Measures a model on held-out text. All ranks call it, and its result is equal on all of them."""


class Validator:
    """The validations of a training run; equal on all ranks.

    newest: the newest validation. best: the one with the lowest loss. num_worse: validations since
    the best one. slowest_s: seconds of the slowest validation of this process; not equal.
    """

    def __init__(self, settings: TrainingConfig, measure: Measure):
        self.settings, self.measure = settings, measure
        self.newest: Validation | None = None
        self.best: Validation | None = None
        self.num_worse = 0
        self.slowest_s = 0.0

    def is_due(self, step: int) -> bool:
        """Return whether the run must be validated after a step."""
        return step % self.settings.valid_interval == 0 or step == self.settings.steps

    def validate(self, model: ShardedModel, step: int) -> Validation:
        """Measure the model after a step."""
        start = time.perf_counter()
        measured = self.measure(model)
        self.slowest_s = max(self.slowest_s, time.perf_counter() - start)
        self.newest = Validation(step=step, loss=measured.loss, kl=measured.kl)
        best_loss = math.inf if self.best is None else self.best.loss
        if measured.loss < best_loss:
            self.best, self.num_worse = self.newest, 0
        else:
            self.num_worse += 1
        return self.newest

    def seconds_until(self, step: int, num_steps: int, step_s: float) -> float:
        """Return the estimated seconds of the validations in the num_steps steps after a step.

        Before the first one, a held-out batch is taken to need as long as a step, which has a
        backward pass as well. step_s: seconds of a step.
        """
        last = min(step + num_steps, self.settings.steps)
        num_validations = sum(map(self.is_due, range(step + 1, last + 1)))
        return num_validations * (self.slowest_s or self.settings.valid_batches * step_s)

    @property
    def best_text(self) -> str:
        """The best validation for the log, "" without one. Not every validated step is saved."""
        if self.best is None:
            return ""
        step, settings = self.best.step, self.settings
        is_saved = step % settings.checkpoint_interval == 0 or step == settings.steps
        return f", lowest {self.best.loss:.4f} at step {step}{'' if is_saved else ' (no checkpoint)'}"

    @property
    def stop_reason(self) -> str:
        """Reason for an early stop; "" to continue."""
        patience = self.settings.patience
        if patience is None or self.num_worse < patience:
            return ""
        since = "" if self.best is None else f" since step {self.best.step}"
        return f"the held-out loss has not improved{since}, in {self.num_worse} validations"

    def state(self) -> dict[str, Any]:
        """Return the state for checkpoints."""
        return {
            "newest": self.newest and self.newest.model_dump(),
            "best": self.best and self.best.model_dump(),
            "num_worse": self.num_worse,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore the result of state()."""
        self.newest = Validation(**state["newest"]) if state["newest"] else None
        self.best = Validation(**state["best"]) if state["best"] else None
        self.num_worse = state["num_worse"]
