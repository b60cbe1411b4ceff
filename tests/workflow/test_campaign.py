"""Faults at random moments: kill -9 of a rank, full disk, Ctrl-C and SIGTERM."""

from __future__ import annotations

import os
import random
import time

import pytest
from campaign import SIGNALS, Result, run_campaign


def report(result: Result) -> str:
    return "\n".join([*map(str, result.faults), *result.problems])


def test_short_campaign(tmp_path):
    """A restarted job ends bitwise like an undisturbed one, and no process is left behind.

    By chance, the orderly end is Ctrl-C or SIGTERM. The whole campaign has both.
    """
    counts = {"kill": 1, random.choice(list(SIGNALS)): 1}
    result = run_campaign(tmp_path, counts, seed=int(time.time()))
    assert not result.problems, report(result)
    assert {kind: result.count(kind) for kind in counts} == counts, report(result)


@pytest.mark.slow
def test_whole_campaign(tmp_path):
    counts = {"kill": 30, "full disk": 10 if os.geteuid() == 0 else 0, "interrupt": 6, "terminate": 6}
    result = run_campaign(tmp_path, counts, seed=int(time.time()))
    assert not result.problems, report(result)
    assert {kind: result.count(kind) for kind in counts} == counts, report(result)
