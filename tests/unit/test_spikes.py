"""Loss spikes are logged, and noise is not."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

from minitron_mp.training.metrics import MetricsLog, StepMetrics
from minitron_mp.training.spikes import FEWEST, WINDOW, SpikeWatch


def noisy_losses(count: int) -> list[float]:
    """A falling loss with 3 % noise."""
    chance = random.Random(0)
    return [(2 + 8 * 0.97**step) * (1 + chance.gauss(0, 0.03)) for step in range(count)]


def test_noise_of_a_falling_loss_is_no_spike():
    watch = SpikeWatch()
    assert not any(watch.add(loss) for loss in noisy_losses(1000))


def test_spike_is_found_also_after_other_spikes():
    losses = noisy_losses(400)
    for step in (300, 301, 310, 350):
        losses[step] = 6.0
    watch = SpikeWatch()
    assert [step for step, loss in enumerate(losses) if watch.add(loss)] == [300, 301, 310, 350]


def test_first_steps_constant_losses_and_nan_are_no_spikes():
    watch = SpikeWatch()
    assert watch.add(1.0) is None
    assert all(watch.add(1.0 + step) is None for step in range(FEWEST - 1))
    constant = SpikeWatch([2.0] * WINDOW)
    assert [constant.add(loss) for loss in (2.001, float("nan"), 2.1)] == [None, None, 2.0]


def step_metrics(step: int, loss: float) -> StepMetrics:
    return StepMetrics(step, loss, loss, loss, 1.0, 1e-3, 10, 1.0, 10.0)


def test_log_has_the_spike_also_after_a_resume(tmp_path, capsys):
    """The losses before the resume are read from metrics.jsonl."""
    path, world = tmp_path / "metrics.jsonl", SimpleNamespace(is_main=True)
    with MetricsLog(path, "distill", 0, world) as log:
        for step in range(1, FEWEST + 1):
            log(step_metrics(step, 2.0))
    with MetricsLog(path, "distill", FEWEST, world) as log:
        log(step_metrics(FEWEST + 1, 3.0))
    assert "distill: loss spike: 3.0000 at step 21, the median of the last" in capsys.readouterr().out
    last = json.loads(path.read_text().splitlines()[-1])
    assert last["spike_over"] == 2.0
