"""Fixtures of several files: pools of ranks, what they computed, once a session and layout, and a finished project."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pool import Pool
from results import Results
from tiny import Run, make_model, make_recipe_file, make_text, minitron

os.environ["COLUMNS"] = (
    "160"  # before the console is imported: a worker of pytest-xdist has the width of somebody's terminal
)

TOGETHER = {
    "test_training": "training",
    "test_hidden_states": "training",
    "test_slicing": "pruning",
    "test_importance": "pruning",
    "test_compress": "projects",
    "test_report": "projects",
    "test_doctor": "projects",
    "test_depth": "judged",
    "test_eval_tasks": "judged",
}
"""Files that share what fixtures of the session compute; any other file is a group of its own."""
FIRST = (*dict.fromkeys(TOGETHER.values()), "test_paper_claims", "test_teacher_stream", "test_search")
"""Groups that take long: one of them at the end would keep one process waiting."""


def group_of(file: str) -> str:
    return TOGETHER.get(Path(file).stem, Path(file).stem)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(
        key=lambda item: FIRST.index(group) if (group := group_of(item.path.name)) in FIRST else len(FIRST)
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """pytest -n 2: a process takes a whole group. The marks that pytest-xdist 3.8.0 has for it are lost under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.split("::")[0])

    return Groups(config, log)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """ranks(size, "module.function", **kwargs) -> the return value of every rank."""
    pools: dict[int, Pool] = {}
    yield lambda size, function, **kwargs: pools.setdefault(size, Pool(size)).run(function, **kwargs)
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def results(ranks, tmp_path_factory) -> Results:
    return Results(ranks, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A model and text."""
    root = tmp_path_factory.mktemp("project")
    make_model(root / "model")
    make_text(root / "text")
    return root


@pytest.fixture(scope="session")
def whole(inputs) -> Run:
    """A finished project, made by one command in one process; to look at, not to change."""
    recipe = make_recipe_file(inputs / "recipe.yaml", inputs / "model", inputs / "text", inputs / "whole")
    return Run(recipe, inputs / "whole", minitron("compress", recipe))
