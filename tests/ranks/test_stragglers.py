"""A slow rank is named in the log and in the metrics."""

from __future__ import annotations

import socket

import pytest
from cases import BY_NAME
from straggler_workers import event_times

from minitron_mp.config.training import TrainingConfig
from minitron_mp.training.stragglers import SlowestRank, slowest_rank


@pytest.mark.parametrize(
    ("name", "slow", "coordinates"),
    [
        ("pp2-dp2", 3, "rank 3 (dp 1, pp 1, cp 0, tp 0)"),
        pytest.param("dp2", 0, "rank 0 (dp 0, pp 0, cp 0, tp 0)", marks=pytest.mark.slow),
        pytest.param("pp2-vpp2-dp2", 1, "rank 1 (dp 1, pp 0, cp 0, tp 0)", marks=pytest.mark.slow),
    ],
)
def test_slow_rank_is_named_once(results, ranks, tmp_path, name, slow, coordinates):
    """Layers take 0.1 s, and 0.2 s on one rank. Each stage has 3 or 2 of the 5 layers."""
    layout = BY_NAME[name]
    arch, student = results.student("qwen3", "all")
    case = {"arch": arch, "student": student, "output": tmp_path / "run", "slow": slow, "log_interval": 2}
    by_rank = ranks(layout.ranks, "straggler_workers.train_with_slow_rank", layout=layout, **case)
    metrics, out, _ = by_rank[0]
    assert all(agrees for _, _, agrees in by_rank)
    lines = [line for line in out.splitlines() if "slow rank" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"distill: slow rank: {coordinates} on {socket.gethostname()}: its forward")
    assert "at step 2, " in lines[0]
    assert [row["slowest_rank"] for row in metrics] == [slow] * 4
    for row in metrics:
        assert row["slowest_forward_s"] == pytest.approx(2 * row["median_forward_s"])


def test_ranks_are_compared_within_their_pipeline_stage():
    """The second stage has more work on all its ranks."""
    assert slowest_rank([1.0, 1.1, 3.0, 3.1], 2) == SlowestRank(1, 1.1, 1.0)
    assert slowest_rank([1.0, 1.0, 3.0, 4.5], 2) == SlowestRank(3, 4.5, 3.0)
    assert slowest_rank([1.0, 2.0, 2.2], 1) == SlowestRank(2, 2.2, 2.0)
    assert slowest_rank([1.0, 9.0], 2) is None, "one rank for each stage"
    assert slowest_rank([1.0], 1) is None
    assert slowest_rank([0.0, 0.0], 1) is None


def test_rank_is_slow_by_a_factor_and_a_time():
    assert SlowestRank(0, 1.4, 1.0).is_slow(1.3)
    assert not SlowestRank(0, 1.2, 1.0).is_slow(1.3)
    assert not SlowestRank(0, 0.04, 0.01).is_slow(1.3), "30 ms"
    assert TrainingConfig().straggler_factor == 1.3
    assert "straggler_factor" not in TrainingConfig(straggler_factor=2).result_settings()


def test_events_of_a_gpu_are_used_again():
    """A pass of one tick, twice; then one of 5 ticks. Two pairs of events."""
    assert event_times("cuda") == (2.0, 5.0, 4)
