"""Shared fixtures, and the order and grouping of test files.

How a test finds what it needs:

* Ranks: the fixture `ranks` starts pools of gloo ranks (support/pool.py). `ranks(4,
  "module.function", **kwargs)` calls a worker function on 4 ranks and returns their values by rank.
  A test of N ranks has no other setup. Ranks of one size are reused by later tests.
* Workers: a worker function is module-level and takes keyword arguments. ranks/test_X.py has its
  workers in ranks/X_workers.py. support/model_workers.py and support/project_workers.py have shared
  ones. `pythonpath` in pyproject.toml puts these folders on the path of tests and ranks.
* Layouts, architectures, weights and batches are in support/cases.py, dense float64 implementations
  of the same computations in support/reference.py, complete small projects in support/tiny.py.
* Shared results: the fixture `results` (support/results.py) computes for each layout what many
  tests read, such as the pruned students or a training run, on first use and once per session.
  Files that read the same results are one group in TOGETHER. A pytest-xdist process takes a whole
  group.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pool import Pool
from results import Results
from tiny import Run, make_model, make_recipe_file, make_text, minitron

# Set before the console is imported: a pytest-xdist worker inherits the width of a terminal.
os.environ["COLUMNS"] = "160"

TOGETHER = {
    "test_training": "training",
    "test_hidden_states": "training",
    "test_validation": "training",
    "test_non_finite": "training",
    "test_uneven_stages": "training",
    "test_optimizer_precision": "training",
    "test_stragglers": "training",
    "test_chat_loss": "training",
    "test_slicing": "pruning",
    "test_importance": "pruning",
    "test_compress": "projects",
    "test_rerun": "projects",
    "test_resume": "projects",
    "test_saved_steps": "projects",
    "test_run_control": "projects",
    "test_optional_stages": "projects",
    "test_teacher_placement": "projects",
    "test_blend_runs": "projects",
    "test_rounds": "projects",
    "test_report": "projects",
    "test_doctor": "projects",
    "test_tokenize": "projects",
    "test_depth": "judged",
    "test_eval_tasks": "judged",
}
"""Test file -> group of files that share session results. Any other file is its own group."""
FIRST = (*dict.fromkeys(TOGETHER.values()), "test_paper_claims", "test_teacher_stream", "test_search")
"""Slow groups, which start first. If one started last, the other process would idle."""


def group_of(file: str) -> str:
    return TOGETHER.get(Path(file).stem, Path(file).stem)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {group: place for place, group in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(group_of(item.path.name), len(FIRST)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Report why GPU tests were skipped. pytest prints a number only, so a missing package is silent."""
    reasons = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if report.nodeid.startswith("tests/gpu/")
    )
    for reason, count in reasons.items():
        terminalreporter.write_line(f"tests/gpu: {count} tests skipped: {reason}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With -n 2, schedule by group.

    The group marks of pytest-xdist 3.8.0 are lost under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.split("::")[0])

    return Groups(config, log)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """ranks(size, "module.function", **kwargs) returns the value of every rank."""
    pools: dict[int, Pool] = {}
    yield lambda size, function, **kwargs: pools.setdefault(size, Pool(size)).run(function, **kwargs)
    for pool in pools.values():
        pool.close()


@pytest.fixture
def one_rank() -> Iterator[None]:
    """This process is the only rank of a gloo group."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def results(ranks, tmp_path_factory) -> Results:
    return Results(ranks, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A folder with a model and text."""
    root = tmp_path_factory.mktemp("project")
    make_model(root / "model")
    make_text(root / "text")
    return root


@pytest.fixture(scope="session")
def whole(inputs) -> Run:
    """A finished project, made by one command in one process.

    Tests read it and must not change it.
    """
    recipe = make_recipe_file(inputs / "recipe.yaml", inputs / "model", inputs / "text", inputs / "whole")
    return Run(recipe, inputs / "whole", minitron("compress", recipe))
