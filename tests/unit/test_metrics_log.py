"""metrics.jsonl and TensorBoard: the training does not wait for TensorBoard."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from torch.utils.tensorboard import SummaryWriter

from minitron_mp.training.metrics import MetricsLog, StepMetrics


def test_step_does_not_wait_for_tensorboard(tmp_path, monkeypatch):
    """A thread writes the points, soon enough that a kill loses few."""
    flushes = []
    monkeypatch.setattr(SummaryWriter, "flush", lambda writer: flushes.append(writer))
    log = MetricsLog(tmp_path / "metrics.jsonl", "distill", 0, SimpleNamespace(is_main=True))
    with log as write:
        time.sleep(0.1)
        [file] = log.board_folder.glob("events.*")
        before = file.stat().st_size
        for step in range(1, 4):
            write(StepMetrics(step, 1.0, 1.0, 1.0, 1.0, 1.0, 1, 1.0, 1.0))
        assert not flushes
        deadline = time.monotonic() + 20
        while file.stat().st_size < before + 500 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert file.stat().st_size >= before + 500
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("count", [1, 100])
def test_points_are_complete_when_the_log_is_closed(tmp_path, count):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path / "metrics.jsonl", "distill", 0, SimpleNamespace(is_main=True))
    with log as write:
        for step in range(1, count + 1):
            write(StepMetrics(step, 1.0, 1.0, 1.0, 1.0, 1.0, 1, 1.0, 1.0))
    board = EventAccumulator(str(log.board_folder))
    board.Reload()
    assert [event.step for event in board.Scalars("distill/loss")] == list(range(1, count + 1))
