"""Validation does not change the training; the best step is kept; patience ends the run."""

from __future__ import annotations

import pytest
from cases import BY_NAME, STEPS

LAYOUTS = {"one": False, "dp2": True, "pp2-vpp2": True, "tp2-pp2-sp": False}
"""Layout -> whether communication is overlapped."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_validation_measures_each_step_and_does_not_change_it(results, ranks, name):
    """Loss and KL are those of the saved models, bitwise."""
    layout = BY_NAME[name]
    by_rank = ranks(
        layout.ranks,
        "validation_workers.validated",
        output=results.root / "validated" / name,
        overlap=LAYOUTS[name],
        **results._training("qwen3", layout),
    )
    metrics, plain = by_rank[0]["metrics"], by_rank[0]["plain"]
    assert all(rank["bitwise"] for rank in by_rank)
    assert [(m.loss, m.grad_norm) for m in metrics] == [(m.loss, m.grad_norm) for m in plain]
    assert len(metrics) == STEPS
    again = by_rank[0]["again"]
    assert [(m.valid_loss, m.valid_kl) for m in metrics[:2]] == [(q.loss, q.kl) for q in again]
    assert metrics[0].valid_kl > 0
    assert plain[0].valid_loss is None


def given(results, ranks, name, losses, **changes):
    layout = BY_NAME["dp2"]
    found = ranks(
        2,
        "validation_workers.with_given_losses",
        output=results.root / "given_losses" / name,
        losses=losses,
        changes=changes,
        **results._training("qwen3", layout),
    )[0]
    assert found["resumed"] == found["whole"]
    return found["whole"]


def steps(*numbers):
    return [f"step_{number:08d}" for number in numbers]


def test_best_checkpoint_is_kept(results, ranks):
    """The best, and the newest; the last step is not a checkpoint."""
    found = given(results, ranks, "best", [1.0, 2.0, 3.0, 1.5])
    assert found["losses"] == [1.0, 2.0, 3.0, 1.5]
    assert found["checkpoints"] == steps(1, 3)


def test_best_checkpoint_is_replaced(results, ranks):
    found = given(results, ranks, "better", [2.0, 1.0, 3.0, 1.5], async_save=True)
    assert found["checkpoints"] == steps(2, 3)


def test_checkpoints_of_keep_every_are_kept(results, ranks):
    found = given(results, ranks, "every", [2.0, 2.0, 1.0, 0.5], keep_every=2, valid_interval=0)
    assert found["checkpoints"] == steps(2, 3)


def test_patience_ends_the_run(results, ranks):
    """After two validations without a lower loss, also if the run resumes between them."""
    found = given(results, ranks, "patience", [1.0, 2.0, 1.0, 0.5], patience=2)
    assert found["steps"] == [1, 2, 3]
    assert found["checkpoints"] == steps(1, 3)
