"""Experiment trackers: Weights & Biases and MLflow beside metrics.jsonl and TensorBoard.

A thread sends the metrics, so that a slow server does not slow the training down. A tracker that
fails is reported once and gets no more metrics in this command.

The file TRACKED_RUNS in the output folder has the id of each run. A resumed training continues the
run with its id. Training with other settings starts a new run.
"""

from __future__ import annotations

import json
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from minitron_mp.artifacts.files import write_text
from minitron_mp.console import say
from minitron_mp.distributed.preemption import Preempted
from minitron_mp.training.metrics import StepMetrics

TRACKED_RUNS = "tracked_runs.json"
"""File in the output folder: section -> settings of the training, and id of its run by tracker."""

QUEUE_STEPS = 10_000
"""Steps that wait for a slow tracker. Further steps are left out."""
BATCH_STEPS = 40
"""Most steps that are sent together. MLflow takes 1,000 values at a time."""
CLOSE_TIMEOUT_S = 60.0
"""Longest wait for a tracker at the end of the training."""
MLFLOW_PARAMETERS = 100
"""Most parameters that MLflow takes at a time."""
MLFLOW_LENGTH = 500
"""Longest value of a parameter in every version of MLflow."""

End = Literal["finished", "stopped", "failed"]
"""How a command ended the training. "stopped": it resumes later."""


@dataclass(frozen=True)
class TrackedTraining:
    """A training whose metrics are sent to trackers.

    root: output folder. section: section of the recipe that is trained. name: name of the run.
    projects: tracker -> project or experiment. identity: changes if and only if a training with
    other settings starts. settings: recipe, as nested dictionaries.
    """

    root: Path
    section: str
    name: str
    projects: dict[str, str]
    identity: str
    settings: dict[str, Any]


class TrackerRun(Protocol):
    """The run of a training in one tracker. Every method may raise any exception."""

    id: str
    place: str
    """Where the user finds the run."""

    def log(self, steps: Sequence[StepMetrics]) -> None: ...
    def finish(self, end: End) -> None: ...


class WandbRun:
    """A run of Weights & Biases. id: that of the run to continue, or "" for a new run."""

    def __init__(self, training: TrackedTraining, id: str):
        import wandb

        self.id = id or uuid.uuid4().hex
        self.run: Any = wandb.init(
            project=training.projects["wandb"],
            id=self.id,
            name=training.name,
            group=training.root.absolute().name,
            job_type=training.section,
            resume="allow",
            reinit="create_new",  # a teacher in correction has a second run at the same time
            dir=str(training.root),
            config=training.settings,
            allow_val_change=True,  # settings that --accept changes
            settings=wandb.Settings(console="off", silent=True, login_timeout=10),
        )
        # Steps between the last checkpoint and a kill are logged twice. W&B ignores a `step` argument
        # that does not increase, so the step is a metric.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.place = str(training.root / "wandb") if self.run.offline else self.run.url

    def log(self, steps: Sequence[StepMetrics]) -> None:
        for metrics in steps:
            self.run.log(metrics.values())

    def finish(self, end: End) -> None:
        self.run.finish(exit_code=1 if end == "failed" else 0)


class MlflowRun:
    """A run of MLflow. id: that of the run to continue, or "" for a new run."""

    STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}  # noqa: RUF012

    def __init__(self, training: TrackedTraining, id: str):
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self.client: Any = MlflowClient()
        self.id = id
        if id:
            self.client.update_run(id, status="RUNNING")
        else:
            name = training.projects["mlflow"]
            experiment = self.client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self.client.create_experiment(name)
            self.id = self.client.create_run(number, run_name=training.name).info.run_id
            # Parameters cannot change later. So they have the settings of the first command.
            parameters = [
                Param(key, str(value)[:MLFLOW_LENGTH]) for key, value in _flat(training.settings).items()
            ]
            for start in range(0, len(parameters), MLFLOW_PARAMETERS):
                self.client.log_batch(self.id, params=parameters[start : start + MLFLOW_PARAMETERS])
        self.place = f"run {self.id} of experiment {training.projects['mlflow']}"

    def log(self, steps: Sequence[StepMetrics]) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        values = [
            Metric(name, value, now, metrics.step)
            for metrics in steps
            for name, value in metrics.values().items()
            if name != "step"
        ]
        self.client.log_batch(self.id, metrics=values)

    def finish(self, end: End) -> None:
        self.client.set_terminated(self.id, self.STATUS[end])


KINDS: dict[str, Callable[[TrackedTraining, str], TrackerRun]] = {"wandb": WandbRun, "mlflow": MlflowRun}
"""Key of the section `log` -> class of its runs."""


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, object]:
    rows: dict[str, object] = {}
    for key, value in tree.items():
        rows |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


class ExperimentLog:
    """Context manager that yields a function for the metrics of each step, on one rank.

    The function returns at once. It and the end of the context raise no error of a tracker.
    """

    def __init__(self, training: TrackedTraining):
        self.training = training
        self.waiting: queue.Queue[StepMetrics | None] = queue.Queue(QUEUE_STEPS)
        self.runs: dict[str, TrackerRun] = {}
        self.end: End = "finished"
        self.num_left_out = 0
        self.thread = threading.Thread(target=self._work, name="experiment trackers", daemon=True)

    def __enter__(self) -> Callable[[StepMetrics], None]:
        self.thread.start()
        return self._add

    def _add(self, metrics: StepMetrics) -> None:
        if not self.thread.is_alive():  # every tracker has failed
            return
        try:
            self.waiting.put_nowait(metrics)
        except queue.Full:
            self.num_left_out += 1
            if self.num_left_out == 1:
                self._say(f"a tracker is {QUEUE_STEPS:,} steps behind; steps are left out from now on")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.end = "stopped" if isinstance(error, (Preempted, KeyboardInterrupt)) else "failed"
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while self.thread.is_alive() and time.monotonic() < deadline:
            try:
                self.waiting.put(None, timeout=0.1)
                break
            except queue.Full:
                continue
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            self._say(f"a tracker has not finished in {CLOSE_TIMEOUT_S:.0f} s; its last steps may be missing")
        elif self.num_left_out:
            self._say(f"{self.num_left_out:,} steps were not sent to the trackers; they are in metrics.jsonl")

    def _say(self, text: str) -> None:
        say(f"{self.training.section}: log: {text}")

    def _work(self) -> None:
        """Start the runs, and send the steps until the end. This is the thread."""
        for tracker in self.training.projects:
            self._try(tracker, partial(self._start, tracker))
        ended = False
        while self.runs and not ended:
            steps, ended = self._next_steps()
            for tracker, run in list(self.runs.items()):
                if steps:
                    self._try(tracker, partial(run.log, steps))
        for tracker, run in list(self.runs.items()):
            self._try(tracker, partial(run.finish, self.end))

    def _start(self, tracker: str) -> None:
        known = _known_run(self.training, tracker)
        run = KINDS[tracker](self.training, known)
        _record_run(self.training, tracker, run.id)
        self.runs[tracker] = run
        self._say(f"{tracker} {'continues' if known else 'starts'} {run.place}")

    def _next_steps(self) -> tuple[list[StepMetrics], bool]:
        """Return the steps that wait, at least one unless the training has ended; whether it has ended."""
        steps: list[StepMetrics] = []
        item = self.waiting.get()
        while item is not None:
            steps.append(item)
            if len(steps) == BATCH_STEPS:
                return steps, False
            try:
                item = self.waiting.get_nowait()
            except queue.Empty:
                return steps, False
        return steps, True

    def _try(self, tracker: str, action: Callable[[], None]) -> None:
        """Call an action of a tracker. If it fails, report it, and send nothing more to this tracker."""
        try:
            action()
        except Exception as error:  # of a foreign library, a server, or a network
            self.runs.pop(tracker, None)
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
            self._say(f"{tracker} failed and gets no more metrics from this command ({reason})")


_FILE = threading.Lock()
"""Held while a thread changes TRACKED_RUNS; a teacher in correction has a thread, too."""


def _known_run(training: TrackedTraining, tracker: str) -> str:
    """Return the id of the run to continue, or "" if there is none."""
    entry = _read(training.root).get(training.section, {})
    return str(entry.get(tracker, "")) if entry.get("identity") == training.identity else ""


def _record_run(training: TrackedTraining, tracker: str, id: str) -> None:
    with _FILE:
        content = _read(training.root)
        entry = content.get(training.section, {})
        if entry.get("identity") != training.identity:
            entry = {"identity": training.identity}
        content[training.section] = {**entry, tracker: id}
        write_text(training.root / TRACKED_RUNS, json.dumps(content, indent=1) + "\n")


def _read(root: Path) -> dict[str, dict[str, str]]:
    try:
        content: dict[str, dict[str, str]] = json.loads((root / TRACKED_RUNS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content
