"""A rank that hangs ends the job after the timeout of the recipe."""

from __future__ import annotations

import contextlib

import pytest
from pool import Pool

TIMEOUT_S = 4.0


@pytest.fixture
def own_pool():
    """Two ranks that no other test uses, because their connections break."""
    two = Pool(2)
    yield two
    with contextlib.suppress(Exception):
        two.close()


def test_collective_of_a_layout_ends_at_the_timeout(own_pool):
    """Megatron's groups have the timeout, too, and not their default of half an hour."""
    waited, _ = own_pool.run("timeout_workers.hang", timeout_minutes=TIMEOUT_S / 60)
    assert 0.5 * TIMEOUT_S < waited < 2.5 * TIMEOUT_S
