"""Hidden-state losses: the same numbers for every layout and for colocated and remote teachers."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from cases import ARCHS, BY_NAME, DISTILL, GLOBAL_BATCH_SIZE, RESUME_AT, make_samples, settings

from minitron_mp.config.distillation import DistillConfig, HiddenStatesConfig
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import make_recipe
from minitron_mp.distillation.layer_pairs import LayerPairs
from minitron_mp.errors import InputError
from minitron_mp.models.axes import HIDDEN
from minitron_mp.planning.memory import payload_bytes_per_token

ROUNDING = 1e-5
"""As in test_training.py."""
ARCH = ARCHS["qwen3"]
# With pp 2 the first stage makes the student's states 0 and 2, the last one 3 and 5. The teacher's
# are 0 and 2, 3 and 6. So states move in both directions.
LAYERS = {0: 0, 2: 3, 3: 2, 5: 6}
COSINE, MSE = HiddenStatesConfig(layers=LAYERS), HiddenStatesConfig(layers=LAYERS, kind="mse", weight=0.25)
BESIDE_DP = ("tp2-dp2-sp", "pp2-vpp2-dp2")
LAYOUTS = ("one", "tp2", "tp2-sp", "pp2", "pp2-vpp2", "cp2", "dp2", "tp2-pp2-sp", "pp2-cp2", *BESIDE_DP)
MORE = tuple(name for name in BY_NAME if name not in LAYOUTS)
"""With --all only: one run each."""
RESUMED = {"one": "one", "pp2-vpp2": "pp2-vpp2", "tp2-pp2-sp": "tp2-pp2-sp", "tp2-sp": "pp2-vpp2"}
"""Layout -> the one that wrote the checkpoint."""
STEPS, FEW = 3, 2
SAVED = ("one", "tp2", "tp2-sp", "pp2-vpp2", "cp2", "dp2", "tp2-pp2-sp")
IDENTITY, RECOMPUTED, OVERLAPPED, SPLIT = (
    ("one", "pp2-vpp2", "tp2-pp2-sp"),
    ("tp2-sp", "pp2-vpp2"),
    ("dp2",),
    ("one", "dp2"),
)


def with_states(layout: str, states: HiddenStatesConfig, **other) -> DistillConfig:
    return settings(BY_NAME[layout]).model_copy(update={"states": states, **other})


def cases(layout: str) -> dict[str, tuple[str, DistillConfig]]:
    """Return run -> (student, settings).

    The students: narrower than the teacher, with a projection; as wide as it; the teacher itself.
    """
    if layout in BESIDE_DP or layout in MORE:
        return {"narrow": ("all", with_states(layout, COSINE, steps=FEW))}
    found = {
        "narrow": ("all", with_states(layout, COSINE, steps=STEPS)),
        "as wide": ("layer", with_states(layout, MSE, steps=FEW)),
    }
    if layout in ("one", "tp2-sp"):
        found["narrow, mse"] = "all", with_states(layout, MSE, steps=FEW)
        found["as wide, cosine"] = "layer", with_states(layout, COSINE, steps=FEW)
    if layout in IDENTITY:
        same = HiddenStatesConfig(layers={j: j for j in (0, 3, 6)})
        found["same"] = "", with_states(layout, same, steps=1, warmup_steps=0, ce_weight=0.0)
    for name, where in (("recompute", RECOMPUTED), ("overlap", OVERLAPPED)):
        if layout in where:
            found[name] = "all", with_states(layout, COSINE, steps=FEW, **{name: True})
    if layout in SPLIT:
        found["split"] = "all", with_states(layout, COSINE, steps=FEW, micro_batch_size=2)
    return found


def students(results, layout):
    def student(axis):
        if not axis:
            return ARCH, results.teacher("qwen3"), list(range(ARCH.hidden_size))
        plan = results.plan("qwen3", axis)
        return *results.student("qwen3", axis), plan.units(HIDDEN).tolist()

    return {name: (student(axis), chosen, None) for name, (axis, chosen) in cases(layout).items()}


def folder(results, layout, name="narrow"):
    return results.root / "states" / layout / name


def trained(results, ranks, layout):
    """hidden_states_workers.train_all, by rank."""

    def train():
        case = {
            "layout": BY_NAME[layout],
            "arch": ARCH,
            "teacher": results.teacher("qwen3"),
            "runs": students(results, layout),
        }
        return ranks(
            case["layout"].ranks,
            "hidden_states_workers.train_all",
            **case,
            output=folder(results, layout).parent,
        )

    return results.once(("states", layout), train)


def resumed(results, ranks, layout, source):
    trained(results, ranks, source)
    student, chosen, _ = students(results, layout)["narrow"]
    case = {"layout": BY_NAME[layout], "arch": ARCH, "teacher": results.teacher("qwen3")}
    runs = {f"resumed from {source}": (student, chosen, folder(results, source))}
    (found,) = ranks(
        case["layout"].ranks,
        "hidden_states_workers.train_all",
        **case,
        runs=runs,
        output=folder(results, layout).parent,
    )[0].values()
    return found


def plain(results, axis, states, steps):
    """Return history, weights and moments of PlainTraining after all steps and after RESUME_AT."""

    def train():
        plan, chosen = (
            results.plan("qwen3", axis),
            DISTILL.model_copy(update={"states": states, "steps": steps}),
        )
        projection = None
        if plan.student.hidden_size != ARCH.hidden_size:
            projection = torch.zeros(ARCH.hidden_size, plan.student.hidden_size)
            projection[plan.units(HIDDEN), torch.arange(plan.student.hidden_size)] = 1.0
        weights = results.weights("qwen3")
        run = reference.PlainTraining(
            ARCH, weights, plan.student, reference.sliced(ARCH, weights, plan), chosen, projection
        )
        at_resume = {}
        for step in range(steps):
            done = step + 1
            decay = max(0, done - chosen.warmup_steps) / (steps - chosen.warmup_steps)
            lr = chosen.min_lr + (chosen.lr - chosen.min_lr) * (1 + math.cos(math.pi * decay)) / 2
            run.step(make_samples(ARCH, step, GLOBAL_BATCH_SIZE), lr)
            if done == RESUME_AT:
                at_resume = {f"optimizer.exp_avg.{key}": run.moments[key][0].clone() for key in run.weights}
                if run.outside:
                    at_resume |= {
                        f"states.{part}": run.moments["projection"][i].clone()
                        for i, part in enumerate(("exp_avg", "exp_avg_sq"))
                    }
                    at_resume["states.projection"] = run.outside["projection"].detach().clone()
                at_resume["states.alpha"] = torch.tensor(run.alpha, dtype=torch.float64)
        return run.history, at_resume

    return results.once(("states", "plain", axis, states.model_dump_json(), steps), train)


def numbers(metrics):
    return [(m.loss, m.divergence, m.ce, m.grad_norm, m.states, m.alpha) for m in metrics]


def assert_close(metrics, history):
    assert len(metrics) == len(history) > 0
    for step, (mine, want) in enumerate(zip(numbers(metrics), history), 1):
        assert mine == pytest.approx(want, rel=ROUNDING), f"step {step}"


@pytest.mark.parametrize(
    ("layout", "name"),
    [(layout, name) for layout in LAYOUTS for name in cases(layout) if name != "same"]
    + [pytest.param(layout, "narrow", marks=pytest.mark.slow) for layout in MORE],
)
def test_steps_match_plain_autograd(results, ranks, layout, name):
    """Loss, its parts, alpha and gradient norm match; the projection is equal on all ranks."""
    axis, chosen = cases(layout)[name]
    by_rank = trained(results, ranks, layout)
    assert_close(by_rank[0][name][0], plain(results, axis, chosen.states, chosen.steps)[0])
    first = by_rank[0][name][1]
    assert (first is None) == (axis == "layer")
    assert first is None or all(torch.equal(first, rank[name][1]) for rank in by_rank), (
        "ranks have different projections"
    )


@pytest.mark.parametrize("layout", SAVED)
def test_gradients_and_projection_match_plain_autograd(results, ranks, layout):
    """Moments, and so gradients, of the model and of the projection, and alpha, match."""
    trained(results, ranks, layout)
    saved = ranks(
        1, "model_workers.read_tensors", folder=folder(results, layout) / f"step_{RESUME_AT:08d}", prefix=""
    )[0]
    want = plain(results, "all", COSINE, STEPS)[1]
    first = torch.zeros_like(want["states.projection"])
    plan = results.plan("qwen3", "all")
    first[plan.units(HIDDEN), torch.arange(plan.student.hidden_size)] = 1.0
    assert (want["states.projection"] - first).abs().max() > DISTILL.lr, "the projection has not moved"
    for key, expected in want.items():
        tolerance = (
            0.05 * DISTILL.lr if key == "states.projection" else 5e-5 * expected.abs().max()
        )  # as in test_training.py
        difference = (saved[key] - expected).abs().max()
        assert difference <= tolerance, f"{key} differs by {difference:.2e}, allowed {tolerance:.2e}"


@pytest.mark.parametrize("layout", RESUMED)
def test_run_resumes(results, ranks, layout):
    """With alpha and projection: bitwise at the same layout, to rounding at another."""
    (found, after), (unbroken, weight) = (
        resumed(results, ranks, layout, RESUMED[layout]),
        trained(results, ranks, layout)[0]["narrow"],
    )
    if RESUMED[layout] == layout:
        assert numbers(found) == numbers(unbroken[RESUME_AT:])
        assert torch.equal(after, weight), "the projection"
    assert_close(found, numbers(unbroken[RESUME_AT:]))
    torch.testing.assert_close(after, weight, rtol=0, atol=0.05 * DISTILL.lr)


@pytest.mark.parametrize("layout", IDENTITY)
def test_student_equal_to_teacher_has_zero_loss_and_gradient(results, ranks, layout):
    runs = trained(results, ranks, layout)[0]
    (same,) = runs["same"][0]
    assert abs(same.states) < 1e-9
    assert abs(same.loss) < 1e-5
    assert same.grad_norm < ROUNDING * runs["narrow"][0][0].grad_norm


REMOTE = {
    "one-from-pp2": ("one", "pp2", 2),
    "pp2-vpp2-from-one": ("pp2-vpp2", "one", 1),
    "pp2-from-pp2": ("pp2", "pp2", 2),
    "tp2-from-tp2": ("tp2", "tp2", 1),
    "tp2-sp-from-tp2-sp": ("tp2-sp", "tp2-sp", 2),
    "cp2-from-cp2": ("cp2", "cp2", 1),
    "dp2-from-one": ("dp2", "one", 2),
}
"""(student, teacher, window)"""


@pytest.mark.parametrize("pair", REMOTE)
def test_remote_teacher_matches_colocated_teacher(results, ranks, pair):
    """Bitwise; also where a window of one microbatch meets interleaved stages."""
    student, teacher, window = REMOTE[pair]
    model, chosen, _ = students(results, student)["narrow"]
    case = {
        "student": BY_NAME[student],
        "teacher": BY_NAME[teacher],
        "window": window,
        "arch": ARCH,
        "weights": results.teacher("qwen3"),
    }
    size = case["student"].ranks + case["teacher"].ranks
    remote = ranks(
        size,
        "hidden_states_workers.train_remote",
        **case,
        model=model,
        settings=chosen,
        output=folder(results, student, pair),
    )[0]
    assert len(remote) == RESUME_AT
    assert numbers(remote) == numbers(trained(results, ranks, student)[0]["narrow"][0][:RESUME_AT])


def test_teacher_without_hidden_states_is_rejected(results, ranks, tmp_path):
    case = {"layout": BY_NAME["one"], "arch": ARCH, "teacher": results.teacher("qwen3"), "output": tmp_path}
    (message,) = ranks(1, "hidden_states_workers.without_pairs", settings=with_states("one", COSINE), **case)
    assert "the teacher delivers no hidden states; construct the teacher with pairs" in message


@pytest.mark.parametrize("vpp", [None, 2, 3])
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_every_hidden_state_has_one_chunk(pp, vpp):
    """Layers in order of depth over the chunks; the final norm with the last one."""
    layout, num_layers = ParallelConfig(pp=pp, vpp=vpp), 14
    order = [
        (chunk % pp, chunk // pp)
        for chunk, count in enumerate(layout.layers_of_chunks(num_layers))
        for _ in range(count)
    ]
    assert [layout.place_of_state(state, num_layers) for state in range(num_layers + 1)] == [
        *order,
        (pp - 1, (vpp or 1) - 1),
    ]


def test_stages_receive_the_blocks_they_match():
    """The last stage always the hidden states; one without a pair nothing."""
    assert HiddenStatesConfig(layers={0: 0, 5: 6, 6: 7, 8: 9}).blocks(8, ParallelConfig(pp=4)) == {
        0: [1],
        2: [2],
        3: [0, 3, 4],
    }
    assert HiddenStatesConfig(layers={0: 0, 5: 6}).blocks(8, ParallelConfig(pp=2, vpp=2)) == {
        0: [1, 2],
        1: [0],
    }


def test_projection_starts_with_the_kept_channels():
    student = ARCH.resized(hidden_size=3)
    assert LayerPairs(COSINE, student, ARCH, (1, 4, 39)).first_projection().nonzero().tolist() == [
        [1, 0],
        [4, 1],
        [39, 2],
    ]
    assert LayerPairs(COSINE, student, ARCH).first_projection().nonzero().tolist() == [[0, 0], [1, 1], [2, 2]]
    assert LayerPairs(COSINE, ARCH, ARCH).first_projection() is None


def test_planner_counts_hidden_state_bytes():
    recipe = make_recipe(
        {
            "model": "m",
            "output": "o",
            "teacher": {"placement": "remote"},
            "distill": {"states": {"layers": {0: 0, 3: 4}}},
        }
    )
    assert payload_bytes_per_token(ARCH, recipe) == 3 * 2 * ARCH.hidden_size


@pytest.mark.parametrize(
    ("states", "other", "message"),
    [
        ({"layers": {}}, {}, r"distill\.states\.layers: must have 1 or more"),
        ({"layers": {3: 1, 2: 2}}, {}, r"the student's states \[3, 2\] must be ascending, without repeats"),
        ({"layers": [[0, 0], [0, 1]]}, {}, r"must be ascending, without repeats"),
        ({"layers": [[0, 1, 2]]}, {}, r"\[0, 1, 2\] must be \[state of the student"),
        (
            {"layers": {0: -1}},
            {},
            r"\[0, -1\] must be \[state of the student, state of the teacher\], counted from 0",
        ),
        ({"layers": {"x": 1}}, {}, r"distill\.states\.layers\.0\.0: .*given 'x'"),
        ({"layers": {0: 0}, "weight": 0}, {}, r"weight 0\.0 must be above 0, or dynamic"),
        ({"layers": {0: 0}, "kind": "l1"}, {}, r"distill\.states\.kind: .*'cosine' or 'mse', given 'l1'"),
        ({"layers": {0: 0}, "kinds": "mse"}, {}, r"unknown key distill\.states\.kinds; did you mean kind\?"),
        (
            {"layers": {0: 0}},
            {"distill": {"kl_weight": 0, "ce_weight": 1}},
            r"states needs kl_weight above 0, given 0; raise it, or drop states",
        ),
        (
            {"layers": {0: 0}},
            {"teacher": {"placement": "cached"}},
            r"a cache does not hold; set teacher\.placement: colocated or remote",
        ),
        (
            {"layers": {0: 0}},
            {"teacher": {"placement": "remote", "payload": "logits"}},
            r"teacher\.payload hidden, given logits; set hidden",
        ),
        (
            {"layers": {0: 0}},
            {"teacher": {"placement": "remote", "siblings": {"s.yaml": 1}}},
            r"is for one student, and teacher\.siblings adds",
        ),
    ],
)
def test_invalid_configs_are_rejected(states, other, message):
    values = {"model": "m", "output": "o", **other, "distill": {**other.get("distill", {}), "states": states}}
    with pytest.raises(InputError, match=message):
        make_recipe(values)


def test_layers_outside_the_model_are_rejected():
    with pytest.raises(
        InputError,
        match=r"(?s)has state 7 of the student, whose states are 0 \(embeddings\) to 6 "
        r".*has state 9 of the teacher",
    ):
        LayerPairs(HiddenStatesConfig(layers={0: 0, 7: 9}), ARCH, ARCH)


def test_pairs_as_mapping_equal_pairs_as_list():
    assert HiddenStatesConfig(layers={"0": 0, 5: 6}) == HiddenStatesConfig(layers=[[0, 0], [5, 6]])
