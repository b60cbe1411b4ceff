"""parallel.layers: stages of given numbers of layers compute the same as one rank."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import test_importance
import test_training
from cases import ARCHS, BY_NAME, DISTILL, RESUME_AT, STEPS, Layout
from pydantic import ValidationError

from minitron_mp.config.distillation import HiddenStatesConfig, TeacherConfig
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distributed.layout import layers_of_stages

ONE = BY_NAME["one"]
LAYOUTS = {
    "pp2": Layout("pp2-uneven", 2, {"pp": 2, "layers": (4, 1), "teacher_layers": (2, 4)}),
    "pp2-vpp2": Layout(
        "pp2-vpp2-uneven", 2, {"pp": 2, "vpp": 2, "layers": (1, 1, 1, 2), "teacher_layers": (2, 1, 1, 2)}
    ),
    "tp2-pp2-sp": Layout(
        "tp2-pp2-sp-uneven",
        4,
        {"tp": 2, "pp": 2, "sequence_parallel": True, "layers": (2, 3), "teacher_layers": (1, 5)},
    ),
}
"""The teacher has 6 layers, the student 5. The even split is [3, 3] and [3, 2]."""
layouts = pytest.mark.parametrize(
    "name", ["pp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pp2-vpp2", "tp2-pp2-sp"))]
)


@layouts
def test_scores_and_plans_match_one_rank(results, name):
    want = results.pruned("qwen3", ONE)[0]
    for rank in results.pruned("qwen3", LAYOUTS[name]):
        pair = test_importance.DEFAULT_PAIR
        test_importance.assert_close(rank["scores"][pair], want["scores"][pair], test_importance.ROUNDING)
        assert all(np.isfinite(values).all() for values in rank["scores"][pair].values())
        assert rank["plans"] == {plan: want["plans"][plan] for plan in rank["plans"]}


@layouts
def test_steps_match_one_rank_and_resume_bitwise(results, name):
    by_rank = results.trained("qwen3", LAYOUTS[name])
    unbroken, resumed = by_rank[0]["unbroken"], by_rank[0]["resumed"]
    test_training.assert_close(unbroken, test_training.one_rank(results))
    assert len(unbroken) == STEPS
    assert [(m.loss, m.grad_norm) for m in unbroken[RESUME_AT:]] == [(m.loss, m.grad_norm) for m in resumed]
    assert all(rank["bitwise"] for rank in by_rank)


@layouts
def test_checkpoint_matches_plain_adam_and_resumes_with_even_stages(results, ranks, name):
    stopped = results.stopped("qwen3", LAYOUTS[name])
    folder = stopped / f"step_{RESUME_AT:08d}"
    saved = ranks(1, "model_workers.read_tensors", folder=folder, prefix="optimizer.")[0]
    _, want = results.plain_training("qwen3")
    assert saved.keys() == want.keys()
    for key, expected in want.items():
        tolerance = 0.05 * DISTILL.lr if ".param." in key else 5e-5 * expected.abs().max()
        assert (saved[key] - expected).abs().max() <= tolerance, key
    case = {"arch": ARCHS["qwen3"], "teacher": results.teacher("qwen3"), "stopped": stopped}
    case |= {"student_arch": results.student("qwen3", "all")[0], "output": stopped.with_name("even")}
    found = ranks(2, "training_workers.resume", layout=BY_NAME["pp2"], **case)[0]
    test_training.assert_close(found, test_training.one_rank(results)[RESUME_AT:])


@layouts
def test_parameters_of_each_stage_match_the_built_model(ranks, name):
    from minitron_mp.planning.memory import rank_parameters

    layout = LAYOUTS[name]
    by_rank = ranks(
        layout.ranks,
        "model_workers.count_parameters",
        layout=layout,
        arch=ARCHS["qwen3"].resized(num_layers=5),
    )
    want = rank_parameters(ARCHS["qwen3"].resized(num_layers=5), ParallelConfig(**layout.parallel))
    assert by_rank == [(stage, want[stage]) for stage, _ in by_rank]
    assert len(Counter(dict(by_rank))) == 2


def test_lists_hold_for_models_with_their_number_of_layers():
    layout = ParallelConfig(**LAYOUTS["pp2-vpp2"].parallel)
    assert layout.layers_of_chunks(5) == [1, 1, 1, 2]
    assert layout.layers_of_chunks(6) == [2, 1, 1, 2]
    assert layout.layers_of_chunks(4) == [1, 1, 1, 1]
    assert layers_of_stages(5, layout) == [[0, 2], [1, 3, 4]]
    assert [layout.place_of_state(state, 5) for state in range(6)] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 1),
        (1, 1),
        (1, 1),
    ]
    pairs = HiddenStatesConfig(layers={0: 0, 3: 5, 4: 6})
    assert pairs.blocks(5, ParallelConfig(pp=2, layers=(4, 1))) == {0: [1, 2], 1: [0, 3]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pp": 2, "layers": [5]}, r"layers \[5\] has 1 numbers for 2 pipeline stages"),
        ({"pp": 2, "vpp": 2, "layers": [3, 3]}, r"has 2 numbers for 4 model chunks \(pp x vpp\)"),
        ({"pp": 2, "layers": [5, 0]}, "greater than or equal to 1"),
        ({"pp": 2, "layers": [4, 1], "teacher_layers": [1, 4]}, "drop teacher_layers"),
    ],
)
def test_lists_that_fit_no_layout_are_rejected(settings, message):
    with pytest.raises(ValidationError, match=message):
        ParallelConfig(**settings)


def test_lists_that_fit_no_model_are_rejected():
    layout = ParallelConfig(pp=2, layers=(4, 2), teacher_layers=(5, 3))
    assert layout.depth_problems({6}, {8}) == []
    first, second = layout.depth_problems({5}, {7, 9})
    assert first == (
        "parallel.layers [4, 2] is 6 layers, the student has 5; give numbers with that sum, such as [3, 2], "
        "or drop it"
    )
    assert (
        "parallel.teacher_layers [5, 3] is 8 layers, the unpruned model and the teacher have 7 or 9" in second
    )
    with pytest.raises(ValidationError, match=r"parallel\.teacher_layers: all models in this layout"):
        TeacherConfig(placement="remote", parallel=ParallelConfig(pp=2, teacher_layers=(3, 3)))


def test_layout_of_the_run_log_is_restored_by_the_command(tmp_path):
    """The list is one word of the shell."""
    from minitron_mp.artifacts.run_log import RunRecord
    from minitron_mp.config.recipe import Recipe

    layout = json.loads(json.dumps(ParallelConfig(pp=2, layers=(4, 2)).model_dump(exclude_defaults=True)))
    record = RunRecord(
        stage="distill",
        fingerprint="",
        seconds=1,
        ended="",
        ranks=2,
        ranks_per_node=2,
        layout=layout,
        device="",
        software={},
    )
    recipe = Recipe(model="m", output="o")
    assert record.layout_overrides(recipe) == " parallel.pp=2 'parallel.layers=[4,2]'"
    same = Recipe(model="m", output="o", parallel=ParallelConfig(pp=2, layers=[4, 2]))
    assert record.layout_overrides(same) == ""
