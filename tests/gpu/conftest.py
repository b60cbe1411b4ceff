"""Fixtures of the GPU tests. MINITRON_REQUIRE_GPU=1: a test fails that lacks a GPU or the engine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

REQUIRED = ("needs a GPU", "needs Transformer Engine")
"""Reasons of skipped tests that are failures where a GPU is required."""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if not report.skipped or os.environ.get("MINITRON_REQUIRE_GPU") != "1":
        return
    reason = str(report.longrepr[2]).removeprefix("Skipped: ")
    if reason in REQUIRED:
        report.outcome = "failed"
        report.longrepr = f"{reason}, and MINITRON_REQUIRE_GPU=1"


@pytest.fixture
def deterministic(monkeypatch) -> Iterator[None]:
    """Backward passes add in a fixed order, so that runs compare bitwise.

    The variable is for Transformer Engine's attention. The setting of torch is for the rest, such
    as index_add and the backward of an embedding; operators without such a kernel only warn.
    """
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # otherwise torch.empty is full of NaN, also padding
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    memory.fill_uninitialized_memory = before[2]
