"""The double of Transformer Engine has the signatures of the wheel."""

from __future__ import annotations

import json
import os
from pathlib import Path

import engine_signatures
import pytest

TABLE = json.loads(engine_signatures.TABLE.read_text())


@pytest.mark.parametrize("name", [*engine_signatures.DEFINITIONS, *engine_signatures.CALLS])
def test_double_has_the_signature_of_the_table(name):
    assert engine_signatures.of_double()[name] == TABLE[name]


def test_table_is_that_of_the_wheel():
    """MINITRON_ENGINE_WHEEL: path of the wheel, see engine_signatures.py."""
    wheel = os.environ.get("MINITRON_ENGINE_WHEEL")
    if wheel is None:
        pytest.skip("needs MINITRON_ENGINE_WHEEL, the path of a wheel of Transformer Engine 2.16.1")
    assert engine_signatures.of_wheel(Path(wheel)) == TABLE
