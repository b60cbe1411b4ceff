"""Metrics in Weights & Biases and MLflow: continued runs, failures, and the real packages if installed."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from fake_trackers import mlflow_double, read_calls, wandb_double

from minitron_mp.config.recipe import make_recipe
from minitron_mp.distributed.preemption import Preempted
from minitron_mp.errors import InputError
from minitron_mp.training import experiment_trackers
from minitron_mp.training.experiment_trackers import TRACKED_RUNS, ExperimentLog, TrackedTraining
from minitron_mp.training.metrics import StepMetrics

NEEDED = {"model": "m", "output": "o"}


def step(number: int) -> StepMetrics:
    return StepMetrics(
        step=number,
        loss=1 / number,
        divergence=None,
        ce=float("nan"),
        grad_norm=1.0,
        lr=0.1,
        num_tokens=8,
        step_time_s=1.0,
        tokens_per_s=8.0,
    )


def training(root: Path, *, identity: str = "first", section: str = "distill", **projects: str):
    settings = {"distill": {f"key{i}": i for i in range(150)}, "output": "x" * 1000}
    return TrackedTraining(root, section, f"run {section}", projects or {"wandb": "p"}, identity, settings)


def send(tracked: TrackedTraining, steps, error: BaseException | None = None) -> None:
    """Send these steps, then end the training, with an error if it is given."""
    with suppress(type(error) if error is not None else SystemExit), ExperimentLog(tracked) as add:
        for number in steps:
            add(step(number))
        if error is not None:
            raise error


def test_resumed_training_continues_the_run(tmp_path, capsys):
    calls = tmp_path / "calls"
    with wandb_double(calls):
        send(training(tmp_path), [1, 2, 3], Preempted("stopped"))
        send(training(tmp_path), [3, 4], InputError("diverged"))
        send(training(tmp_path), [5])
        send(training(tmp_path, section="correct"), [1])
        send(training(tmp_path, identity="other"), [1])
        send(training(tmp_path), [1])
    rows = read_calls(calls)
    ids = [row["id"] for row in rows if row["call"] == "init"]
    assert ids[0] == ids[1] == ids[2], "the same settings"
    assert len(set(ids[2:])) == 4, "another section, other settings, and the first ones again"
    assert {row["resume"] for row in rows if row["call"] == "init"} == {"allow"}
    assert [row["values"]["step"] for row in rows if row["call"] == "log"][:6] == [1, 2, 3, 3, 4, 5]
    first = next(row["values"] for row in rows if row["call"] == "log")
    assert first["loss"] == 1.0
    assert "ce" not in first, "a value that is not finite"
    assert [row["exit_code"] for row in rows if row["call"] == "finish"][:3] == [0, 1, 0]
    out = capsys.readouterr().out
    assert out.count("distill: log: wandb starts https://wandb.example/run") == 3
    assert out.count("distill: log: wandb continues") == 2
    assert set(json.loads((tmp_path / TRACKED_RUNS).read_text())) == {"distill", "correct"}


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_failing_tracker_is_reported_once_and_others_continue(tmp_path, capsys, call):
    with wandb_double(tmp_path / "wandb", fails_at=call), mlflow_double(tmp_path / "mlflow"):
        send(training(tmp_path, wandb="p", mlflow="e"), range(1, 200))
    out = capsys.readouterr().out
    failure = f"wandb failed and gets no more metrics from this command (RuntimeError: no {call} today)"
    assert out.count("failed") == out.count(failure) == 1
    logged = [row for row in read_calls(tmp_path / "mlflow") if row["call"] == "log_batch"]
    losses = [number for row in logged for name, _, number in row["metrics"] if name == "loss"]
    assert losses == list(range(1, 200))
    assert len(read_calls(tmp_path / "wandb")) <= (1 if call == "init" else 2 if call == "log" else 201)


def test_training_does_not_wait_for_a_slow_tracker(tmp_path, capsys, monkeypatch):
    """Steps that do not fit the queue are left out; the end waits for a limited time."""
    release = threading.Event()

    class Slow:
        def __init__(self, *arguments) -> None:
            self.id, self.place = "1", "here"

        def log(self, steps) -> None:
            release.wait()

        def finish(self, end) -> None: ...

    monkeypatch.setattr(experiment_trackers, "QUEUE_STEPS", 5)
    monkeypatch.setattr(experiment_trackers, "CLOSE_TIMEOUT_S", 0.3)
    monkeypatch.setitem(experiment_trackers.KINDS, "wandb", Slow)
    send(training(tmp_path), range(1, 100))
    release.set()
    out = capsys.readouterr().out
    assert out.count("a tracker is 5 steps behind; steps are left out from now on") == 1
    assert out.count("a tracker has not finished in 0 s; its last steps may be missing") == 1


def test_mlflow_gets_parameters_once(tmp_path):
    calls = tmp_path / "calls"
    with mlflow_double(calls):
        send(training(tmp_path, mlflow="e"), [1, 2], KeyboardInterrupt())
        send(training(tmp_path, mlflow="e"), [3])
    rows = read_calls(calls)
    parameters = [row["params"] for row in rows if row["call"] == "log_batch" and row["params"]]
    assert [len(part) for part in parameters] == [100, 51]
    assert parameters[0]["distill.key3"] == "3"
    assert len(parameters[1]["output"]) == 500
    assert [row["call"] for row in rows].count("create_run") == 1
    assert [row["status"] for row in rows if "status" in row] == ["KILLED", "RUNNING", "FINISHED"]


def test_damaged_file_of_ids_starts_a_new_run(tmp_path):
    (tmp_path / TRACKED_RUNS).write_text("{half")
    with wandb_double(tmp_path / "calls"):
        send(training(tmp_path), [1])
    assert json.loads((tmp_path / TRACKED_RUNS).read_text())["distill"]["wandb"]


def test_section_is_checked():
    assert make_recipe(NEEDED).log.trackers == []
    assert make_recipe({**NEEDED, "log": {"mlflow": "e", "wandb": "p"}}).log.trackers == ["wandb", "mlflow"]
    with pytest.raises(InputError, match="log: name: no effect without wandb or mlflow"):
        make_recipe({**NEEDED, "log": {"name": "x"}})
    with pytest.raises(InputError, match=r"log\.wandb: must not be empty"):
        make_recipe({**NEEDED, "log": {"wandb": ""}})


@pytest.mark.skipif(not find_spec("wandb"), reason="needs wandb")
def test_real_wandb_offline(tmp_path, monkeypatch, capsys):
    """Two commands write two offline runs with one id; `wandb sync` would join them."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    send(training(tmp_path), [1, 2], Preempted("stopped"))
    send(training(tmp_path), [3])
    assert "failed" not in capsys.readouterr().out
    id = json.loads((tmp_path / TRACKED_RUNS).read_text())["distill"]["wandb"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{id}*/run-{id}.wandb"))
    assert len(files) == 2
    assert all(file.stat().st_size for file in files)


@pytest.mark.skipif(not find_spec("wandb"), reason="needs wandb")
def test_real_wandb_without_a_key_does_not_end_the_training(tmp_path, monkeypatch, capsys):
    import wandb

    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    send(training(tmp_path), [1, 2])
    assert capsys.readouterr().out.count("wandb failed and gets no more metrics") == 1


@pytest.mark.skipif(not find_spec("mlflow"), reason="needs mlflow")
def test_real_mlflow_file_store(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    send(training(tmp_path, mlflow="e"), [1, 2], Preempted("stopped"))
    id = json.loads((tmp_path / TRACKED_RUNS).read_text())["distill"]["mlflow"]
    assert MlflowClient().get_run(id).info.status == "KILLED"
    send(training(tmp_path, mlflow="e"), [3])
    assert "failed" not in capsys.readouterr().out
    run = MlflowClient().get_run(id)
    assert run.info.status == "FINISHED"
    assert run.data.params["distill.key7"] == "7"
    history = MlflowClient().get_metric_history(id, "loss")
    assert [(point.step, point.value) for point in history] == [(n, 1 / n) for n in (1, 2, 3)]
