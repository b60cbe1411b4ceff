"""A step with a non-finite gradient or loss has no update; rank and parameter are named."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BY_NAME, STEPS, settings

from minitron_mp.config.distillation import HiddenStatesConfig
from minitron_mp.models.axes import HIDDEN

FC2 = "decoder.layers.{}.mlp.linear_fc2.weight"
CASES = {
    "one": (FC2.format(0), 0, "rank 0 (dp 0, pp 0, cp 0, tp 0)", {}),
    "dp2": (FC2.format(1), 1, "rank 1 (dp 1, pp 0, cp 0, tp 0)", {"overlap": True}),
    "tp2-pp2-sp": (FC2.format(3), 3, "rank 3 (dp 0, pp 1, cp 0, tp 1)", {}),
    "cp2-dp2": (FC2.format(2), 2, "rank 2 (dp 1, pp 0, cp 0, tp 0)", {}),
    "pp2-vpp2": ("decoder.layers.0.self_attention.linear_qkv.weight", 0, "rank 0 (dp 0, pp 0", {}),
}


@pytest.fixture(
    scope="module",
    params=[
        "one",
        "tp2-pp2-sp",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("dp2", "cp2-dp2", "pp2-vpp2")),
    ],
)
def case(request, results, ranks):
    """(parameter, place, results by rank) of one layout."""
    layout = BY_NAME[request.param]
    name, rank, place, changes = CASES[request.param]
    by_rank = ranks(
        layout.ranks,
        "non_finite_workers.skipped_step",
        output=results.root / "non_finite" / layout.name,
        parameter_name=name,
        rank=rank,
        changes=changes,
        **results._training("qwen3", layout),
    )
    return name, place, by_rank


def test_log_names_the_first_rank_and_parameter(case):
    name, place, by_rank = case
    for rank in by_rank:  # every rank has the text, rank 0 prints it
        assert len(rank["lines"]) == 2, "one line per run"
        assert f"first gradient that is not finite: {name} on {place}" in rank["lines"][0]
        assert "update skipped: step 2 has gradient norm nan; " in rank["lines"][0]
        assert "(1 in a row, 1 of 2 steps)" in rank["lines"][0]


def test_skipped_step_changes_nothing(case):
    """Weights, moments, Adam's step and the learning rates of the other steps."""
    _, _, by_rank = case
    assert all(rank["expected bitwise"] for rank in by_rank)
    whole, expected = by_rank[0]["whole"], by_rank[0]["expected"]
    assert [m.lr for m in whole] == [m.lr for m in expected]
    assert [m.loss for m in whole] == [m.loss for m in expected]
    assert [m.num_skipped for m in whole] == [None, 1, 1, 1]
    assert [math.isfinite(m.grad_norm) for m in whole] == [True, False, True, True]
    assert "grad_norm" not in whole[1].values()


def test_run_resumes_bitwise_after_a_skipped_step(case):
    _, _, by_rank = case
    assert all(rank["resumed bitwise"] for rank in by_rank)
    assert all(rank["first step"] for rank in by_rank), "before the first update"
    whole, resumed = (
        [(m.step, m.loss, m.lr, m.num_skipped) for m in by_rank[0][name]] for name in ("whole", "resumed")
    )
    assert len(whole) == STEPS
    assert resumed == whole


def test_run_ends_after_max_skipped_steps_in_a_row(case):
    name, place, by_rank = case
    for rank in by_rank:
        assert "2 steps in a row have a gradient or loss that is not finite" in rank["ended"]
        assert "max_skipped allows 1: step 3 has gradient norm nan; " in rank["ended"]
        assert f"{name} on {place}" in rank["ended"]


@pytest.mark.parametrize("layout", ["pp2-dp2", "tp2"])
def test_teacher_that_is_not_finite_is_named(results, ranks, layout):
    layout = BY_NAME[layout]
    by_rank = ranks(
        layout.ranks,
        "non_finite_workers.teacher_is_not_finite",
        output=results.root / "teacher_is_not_finite" / layout.name,
        **results._training("qwen3", layout),
    )
    rank = layout.ranks - 1 if layout.dp > 1 else 0
    for lines in by_rank:
        assert f"the divergence of the student is nan on rank {rank} (" in lines[0]
        assert "its cross-entropy is finite, so check the teacher" in lines[0]


@pytest.mark.parametrize("name", ["one", "pp2"])
def test_skipped_step_keeps_alpha_and_projection(results, ranks, name):
    """And the run resumes bitwise before and after it."""
    layout = BY_NAME[name]
    states = HiddenStatesConfig(layers={0: 0, 2: 3, 3: 2, 5: 6})
    for rank in ranks(
        layout.ranks,
        "non_finite_workers.skipped_step_with_hidden_states",
        channels=results.plan("qwen3", "all").units(HIDDEN).tolist(),
        chosen=settings(layout).model_copy(update={"states": states, "steps": 3}),
        output=results.root / "non_finite_states" / name,
        **results._training("qwen3", layout),
    ):
        assert rank["bitwise"]
        whole, first, second, third = zip(rank["alpha"], rank["projection"])
        assert first[0] == second[0] != third[0] == whole[0]
        assert torch.equal(first[1], second[1])
        assert not torch.equal(second[1], third[1])
        assert torch.equal(third[1], whole[1])
