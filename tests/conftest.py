"""Fixtures of several files: pools of ranks, what they computed, once a session and layout, and a finished project."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pool import Pool
from results import Results
from tiny import Run, make_model, make_recipe_file, make_text, minitron


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
