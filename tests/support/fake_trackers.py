"""Doubles of wandb and mlflow with the calls that training/experiment_trackers.py makes.

They write each call to a file, because ranks and threads make the calls. Tests of the real packages
are in unit/test_experiment_trackers.py, for an environment that has them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(members)
    return module


def read_calls(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@contextmanager
def wandb_double(calls: Path, fails_at: str = "") -> Iterator[None]:
    """fails_at: the call that raises an exception: "init", "log" or "finish"."""

    def record(call: str, **values: Any) -> None:
        with calls.open("a") as file:
            file.write(json.dumps({"call": call, "process": os.getpid(), **values}) + "\n")
        if call == fails_at:
            raise RuntimeError(f"no {call} today\nsecond line")

    class Run:
        url = "https://wandb.example/run"
        offline = False

        def define_metric(self, name: str, step_metric: str = "") -> None: ...

        def log(self, values: dict[str, float]) -> None:
            record("log", values=values)

        def finish(self, exit_code: int) -> None:
            record("finish", exit_code=exit_code)

    def init(*, settings: Any, **values: Any) -> Run:
        record("init", **values)
        return Run()

    module = _module("wandb", init=init, Settings=lambda **values: SimpleNamespace(**values))
    with patch.dict(sys.modules, wandb=module):
        yield


@contextmanager
def mlflow_double(calls: Path) -> Iterator[None]:
    def record(call: str, **values: Any) -> None:
        with calls.open("a") as file:
            file.write(json.dumps({"call": call, **values}) + "\n")

    class Client:
        def get_experiment_by_name(self, name: str) -> Any:
            known = any(row["call"] == "create_experiment" for row in read_calls(calls))
            return SimpleNamespace(experiment_id="7") if known else None

        def create_experiment(self, name: str) -> str:
            record("create_experiment", name=name)
            return "7"

        def create_run(self, experiment: str, run_name: str) -> Any:
            record("create_run", experiment=experiment, name=run_name)
            return SimpleNamespace(info=SimpleNamespace(run_id="run"))

        def update_run(self, id: str, status: str) -> None:
            record("update_run", id=id, status=status)

        def log_batch(self, id: str, metrics: Any = (), params: Any = ()) -> None:
            assert len(params) <= 100
            assert len(metrics) <= 1000
            record("log_batch", id=id, metrics=[[m[0], m[1], m[3]] for m in metrics], params=dict(params))

        def set_terminated(self, id: str, status: str) -> None:
            record("set_terminated", id=id, status=status)

    def entity(*values: Any) -> tuple[Any, ...]:
        return values

    modules = {
        "mlflow": _module("mlflow"),
        "mlflow.entities": _module("mlflow.entities", Metric=entity, Param=entity),
        "mlflow.tracking": _module("mlflow.tracking", MlflowClient=Client),
    }
    with patch.dict(sys.modules, modules):
        yield
