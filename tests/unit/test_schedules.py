"""Learning-rate schedules of training runs follow their closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.pruning import SearchConfig
from minitron_mp.config.recipe import make_recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.pruning.candidates import training
from minitron_mp.training.optimizer import learning_rate_schedule

STEPS, WARMUP, DECAY, LR, MIN_LR = 20, 4, 6, 1e-3, 1e-4
SHAPES = {
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "exponential": lambda x: 2 / 2**x - 1,
}


def settings(**changes: Any) -> TrainingConfig:
    lengths = {"steps": STEPS, "warmup_steps": WARMUP, "lr": LR, "min_lr": MIN_LR}
    return TrainingConfig(**{**lengths, **changes})


def rates(chosen: TrainingConfig, first: int = 0) -> list[float]:
    """Return the learning rate of each step; a run that resumes begins at step `first`."""
    optimizer = SimpleNamespace(param_groups=[{}])
    schedule = learning_rate_schedule(optimizer, chosen)
    schedule.step(increment=first)
    found = []
    for _ in range(first, chosen.steps):
        schedule.step(increment=1)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def with_warmup(rate_of: Any) -> list[float]:
    warmup = [LR * step / WARMUP for step in range(1, WARMUP + 1)]
    return warmup + [rate_of(step) for step in range(WARMUP + 1, STEPS + 1)]


def between(share: float) -> float:
    return MIN_LR + (LR - MIN_LR) * share


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decay_over_the_whole_run(name):
    expected = with_warmup(lambda step: between(SHAPES[name]((step - WARMUP) / (STEPS - WARMUP))))
    assert rates(settings(schedule=name)) == pytest.approx(expected)
    assert expected[-1] == pytest.approx(MIN_LR)


def test_default_is_cosine():
    assert rates(settings()) == rates(settings(schedule="cosine"))


def test_constant():
    assert rates(settings(schedule="constant")) == pytest.approx(with_warmup(lambda step: LR))


@pytest.mark.parametrize("shape", SHAPES)
def test_wsd_is_stable_and_then_decays(shape):
    begin = STEPS - DECAY

    def rate(step: int) -> float:
        return LR if step <= begin else between(SHAPES[shape]((step - begin) / DECAY))

    found = rates(settings(schedule="wsd", decay_steps=DECAY, decay_shape=shape))
    assert found == pytest.approx(with_warmup(rate))
    assert found[-1] == pytest.approx(MIN_LR)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_resumed_run_has_the_same_rates(name):
    chosen = settings(schedule=name, decay_steps=DECAY if name == "wsd" else None)
    assert rates(chosen, first=7) == rates(chosen)[7:]


def test_more_steps_of_wsd_only_extend_its_stable_part():
    """A run can be prolonged until its decay begins."""
    short, long = (settings(schedule="wsd", decay_steps=DECAY, steps=steps) for steps in (20, 30))
    assert rates(long)[: STEPS - DECAY] == rates(short)[: STEPS - DECAY]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "wsd"}, "schedule wsd needs decay_steps"),
        ({"schedule": "wsd", "decay_steps": 17}, "warmup_steps 4 and decay_steps 17 are more than steps 20"),
        ({"decay_steps": 3}, "decay_steps: no effect with schedule cosine"),
        ({"decay_shape": "linear"}, "decay_shape: no effect with schedule cosine"),
    ],
)
def test_settings_that_do_not_fit_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_default_schedule_is_not_in_the_fingerprint():
    """Checkpoints from before these keys can resume."""
    keys = {"schedule", "decay_steps", "decay_shape"}
    assert not keys & settings().result_settings().keys()
    chosen = settings(schedule="wsd", decay_steps=DECAY, decay_shape="linear").result_settings()
    assert keys <= chosen.keys()


def test_short_trainings_of_a_search_keep_the_share_of_the_decay():
    recipe = make_recipe({"model": "m", "output": "o"})
    distill = DistillConfig(steps=100, schedule="wsd", decay_steps=20)
    recipe = recipe.model_copy(update={"distill": distill, "search": SearchConfig(parameters=1e6, steps=50)})
    assert training(recipe).decay_steps == 10
