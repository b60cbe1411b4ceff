"""Fixtures of the multi-rank tests: pools of ranks, and what they computed, once a session and layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pool import Pool
from results import Results


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
