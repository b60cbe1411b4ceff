"""The layout search, the whole run, published rates, and the layouts of the shipped recipes."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
from tiny import ROOT

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe, load_recipe, make_recipe
from minitron_mp.planning.advice import host_warning, settings_text
from minitron_mp.planning.campaign import (
    best_campaign,
    best_interval_s,
    campaign,
    correction_problem,
    save_seconds,
    total_gpu_hours,
)
from minitron_mp.planning.case import PlanningCase
from minitron_mp.planning.command import read_models
from minitron_mp.planning.estimate import Estimate
from minitron_mp.planning.hardware import GPUS, read_hardware
from minitron_mp.planning.layouts import fits, layout_problem
from minitron_mp.planning.published import (
    KD_TFLOPS,
    comparisons,
    correction,
    published_distillation,
)
from minitron_mp.planning.search import search_layouts
from minitron_mp.planning.step_time import estimate_distillation
from minitron_mp.planning.times import Times, read_times
from minitron_mp.planning.variants import dividing_batch, uneven_layouts

TWELVE_TO_EIGHT = "examples/mn_minitron_8b.yaml"
RECIPES = sorted(path for path in (ROOT / "examples").glob("*.yaml") if path.stem != "quickstart")


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.chdir(ROOT)


@functools.cache
def times_of(gpu: str = "h100", *, corrected: bool = True) -> Times:
    return read_times(gpu, read_hardware(gpu), corrected=corrected)


def case_of(recipe: Recipe, world: int) -> PlanningCase:
    models = read_models(recipe)
    return PlanningCase(models.student, models.teacher, recipe, world)


def twelve_to_eight(*overrides: str, world: int = 256) -> PlanningCase:
    return case_of(load_recipe(TWELVE_TO_EIGHT, overrides), world)


def fp8_overrides(path: Path) -> list[str]:
    """Return the overrides that a recipe's comment gives for FP8; [] without the comment."""
    found = re.search(r"# FP8 overrides: (.*(?:\n#   .*)*)", path.read_text(encoding="utf-8"))
    return found[1].replace("\n#", "").split() if found else []


def published_world(path: Path) -> int:
    found = re.search(r"--world (\d+)", path.read_text(encoding="utf-8"))
    assert found
    return int(found[1])


def whole_run(estimate: Estimate, times: Times) -> float:
    return total_gpu_hours(campaign(estimate, read_models(estimate.recipe).base, times))


@pytest.mark.parametrize(
    ("path", "fp8"),
    [(path, fp8) for path in RECIPES for fp8 in (False, True) if not fp8 or fp8_overrides(path)],
    ids=lambda value: value.stem if isinstance(value, Path) else "fp8" if value else "bf16",
)
def test_recipes_have_the_best_layout(path, fp8):
    """Within 2 % of the fewest GPU-hours that the search finds for the published number of GPUs."""
    overrides = fp8_overrides(path) if fp8 else []
    world = published_world(path)
    times = times_of("a100" if world == 128 else "h100")
    rounds = zip(load_recipe(path, overrides).all_rounds, load_recipe(path).all_rounds)
    # The first round of a recipe with rounds is that of another recipe.
    for recipe, plain in list(rounds)[1 if load_recipe(path).rounds else 0 :]:
        case, base = case_of(recipe, world), read_models(recipe).base
        assert layout_problem(case, times) is None
        own = estimate_distillation(case, times)
        assert fits(own, times)
        if recipe.pruning_base == "correct":
            assert correction_problem(base, recipe.correct, recipe, case.student_ranks, times) is None
        found = search_layouts(case.with_recipe(plain), times, fp8=fp8)
        best = best_campaign(found.possible, base, times)
        assert whole_run(own, times) <= 1.02 * whole_run(best, times)
        if not fp8 and recipe.previous is None:
            assert host_warning(own, times) is None


def test_twelve_to_eight_costs_half_of_the_layout_with_tp_8():
    """The sums that docs/planning.md gives for 256 H100."""
    times = times_of()
    before = twelve_to_eight("parallel.tp=8", *old_training("distill"), *old_training("correct"))
    fp8 = twelve_to_eight(*fp8_overrides(ROOT / TWELVE_TO_EIGHT))
    sums = [whole_run(estimate_distillation(case, times), times) for case in (before, twelve_to_eight(), fp8)]
    assert sums == pytest.approx([42_960, 21_350, 16_410], rel=0.01)


def old_training(section: str) -> list[str]:
    keys = {"overlap": "false", "tp_comm_overlap": "false", "recompute": "true", "checkpoint_interval": "100"}
    return [f"{section}.{key}={value}" for key, value in keys.items()]


@pytest.mark.parametrize(("gpu", "fp8"), [("h100", False), ("h100", True), ("a100", False)])
def test_corrections_are_the_means_of_published_ratios(gpu, fp8):
    mean, ratios = correction(comparisons(gpu), fp8=fp8)
    hardware = GPUS[gpu]
    assert mean == pytest.approx(hardware.correction_fp8 if fp8 else hardware.correction_bf16, abs=0.005)
    spread = {("h100", False): (1.06, 1.10), ("h100", True): (0.95, 1.26), ("a100", False): (1.04, 1.18)}
    low, high = spread[gpu, fp8]
    assert low < min(ratios) <= max(ratios) < high


def test_published_rates_are_those_of_the_sources():
    """Megatron-Bridge publishes 744 and DGX Cloud, with full attention, 59.37 % of 989 TFLOP/s."""
    rates = {(each.run.source, each.run.model, each.run.fp8): each.run for each in comparisons("h100")}
    assert rates["Megatron-Bridge 25.11", "Llama 3 8B", "tensorwise"].tflops == pytest.approx(744, rel=0.002)
    run = rates["Megatron-Bridge 25.11", "Llama 3 70B", "tensorwise"]
    assert run.tflops == pytest.approx(719, rel=0.002)
    assert comparisons("h100")[0].run.tokens_per_gpu_s * 8 == pytest.approx(81222, rel=0.001)
    assert published_distillation(times_of(corrected=False)).tflops / KD_TFLOPS == pytest.approx(
        2.04, abs=0.02
    )


def test_correction_is_a_factor_of_each_format():
    bf16 = estimate_distillation(twelve_to_eight(), times_of())
    raw = estimate_distillation(twelve_to_eight(), times_of(corrected=False))
    assert (bf16.correction, raw.correction) == (pytest.approx(1.085), 1.0)
    assert bf16.arithmetic_s == raw.arithmetic_s == raw.step_s
    assert bf16.gpu_hours == pytest.approx(1.085 * raw.gpu_hours)
    assert bf16.tflops == pytest.approx(raw.tflops / 1.085)
    student = estimate_distillation(twelve_to_eight("distill.fp8=tensorwise"), times_of())
    assert 1.065 < student.correction < 1.085
    remote = ["teacher.placement=remote", "teacher.ranks=32", "distill.fp8=tensorwise"]
    slow_teacher = estimate_distillation(twelve_to_eight(*remote, world=224), times_of())
    assert slow_teacher.correction == pytest.approx(1.085)


def test_search_tries_overlap_uneven_stages_and_nearby_batches():
    case = twelve_to_eight("parallel.tp=8", "distill.overlap=false", "distill.tp_comm_overlap=false")
    found = search_layouts(case, times_of()).possible
    tokens = case.recipe.distill.num_samples
    for estimate in found:
        d, p = estimate.recipe.distill, estimate.recipe.parallel
        assert d.overlap
        assert d.tp_comm_overlap == (p.tp > 1)
        assert abs(d.global_batch_size - 768) <= 77
        assert d.num_samples == pytest.approx(tokens, rel=1e-3)
    assert {estimate.recipe.distill.global_batch_size for estimate in found} > {768}
    uneven = search_layouts(twelve_to_eight(world=16), times_of()).possible
    layouts = [estimate.recipe.parallel for estimate in uneven if estimate.recipe.parallel.layers]
    assert layouts
    assert all(sum(layout.layers) == 40 for layout in layouts)


def test_cuda_graphs_are_tried_where_the_host_limits():
    """At 1024 tokens, where a layer takes the GPU less time than the host needs to issue it."""
    case = twelve_to_eight("data.sequence_length=1024", world=8)
    found = search_layouts(case, times_of(), fp8=True).possible
    graphs = [estimate for estimate in found if estimate.recipe.distill.cuda_graphs]
    assert graphs
    for estimate in graphs:
        assert not estimate.recipe.distill.recompute
        make_recipe(estimate.recipe.model_dump())


def test_partial_recomputation_is_tried():
    """On GPUs with less memory: the fewest layers that fit are recomputed."""
    hardware = GPUS["h100"].model_copy(update={"memory_gib": 34.0})
    best, *rest = search_layouts(twelve_to_eight(world=8), read_times("h100", hardware)).possible
    assert best.recipe.distill.recompute == 36
    assert [estimate.recipe.distill.recompute for estimate in rest] == [True]
    assert best.step_s < rest[0].step_s


@pytest.mark.slow
@pytest.mark.parametrize("world", [8, 64, 256])
def test_pruned_search_finds_the_fastest_layout(world, monkeypatch):
    """Also with all shares of a remote teacher, and when many more layouts are refined."""
    case = twelve_to_eight(world=world)
    fast = search_layouts(case, times_of()).possible[0]
    monkeypatch.setattr("minitron_mp.planning.variants.TEACHER_RANGE", (0, 100))
    monkeypatch.setattr("minitron_mp.planning.search.REFINED", 80)
    thorough = search_layouts(case, times_of()).possible[0]
    assert fast.gpu_hours <= 1.001 * thorough.gpu_hours


REMOTE_TOP_K = [
    *("teacher.placement=remote", "teacher.payload=topk", "teacher.top_k=64", "teacher.window=5"),
    *("teacher.ranks=64", "teacher.parallel.tp=2", "teacher.parallel.pp=2", "parallel.tp=2"),
]


@pytest.mark.parametrize(
    "start", [["parallel.tp=8", "distill.recompute=true"], REMOTE_TOP_K], ids=["colocated", "remote"]
)
def test_settings_turn_the_recipe_into_the_proposed_one(start):
    recipe = load_recipe(TWELVE_TO_EIGHT, start)
    times = times_of()
    for fp8 in (False, True):
        best = search_layouts(case_of(recipe, 256), times, fp8=fp8).possible[0]
        overrides = settings_text(best, recipe).split()
        changed = load_recipe(TWELVE_TO_EIGHT, [*start, *overrides])
        again = estimate_distillation(case_of(changed, 256), times)
        assert again.step_s == pytest.approx(best.step_s)
        assert again.needed_bytes == pytest.approx(best.needed_bytes)
    assert settings_text(best, best.recipe) == "those of the recipe"


def test_gpus_of_a_remote_teacher_wait_during_correction():
    """All other stages run on the student's GPUs."""
    times, base = times_of(), read_models(load_recipe(TWELVE_TO_EIGHT)).base
    hours = [
        {item.name: item.gpu_hours for item in campaign(estimate_distillation(case, times), base, times)}
        for case in (
            twelve_to_eight(),
            twelve_to_eight("teacher.placement=remote", "teacher.ranks=64"),
        )
    ]
    assert hours[1]["teacher correction"] == pytest.approx(
        256 / 192 * hours[0]["teacher correction"], rel=0.01
    )


def test_layers_of_the_last_stage_go_to_the_others():
    layouts = uneven_layouts(ParallelConfig(pp=2, vpp=4), 40)
    assert [layout.layers for layout in layouts] == [
        (6, 5, 5, 5, 5, 5, 5, 4),
        (6, 5, 6, 5, 5, 4, 5, 4),
        (6, 5, 6, 4, 6, 4, 5, 4),
    ]
    assert uneven_layouts(ParallelConfig(), 40) == []


@pytest.mark.parametrize(("unit", "batch"), [(96, 768), (88, 792), (72, 792), (128, 768), (500, None)])
def test_nearby_batches_keep_the_tokens(unit, batch):
    training = load_recipe(TWELVE_TO_EIGHT).distill
    found = dividing_batch(training, 1, unit, 1)
    assert (found and found.global_batch_size) == batch
    if found:
        assert abs(found.num_samples - training.num_samples) <= batch / 2


def test_parts_of_a_run_follow_their_formulas():
    """Checkpoints, validation, failures and reading of the 12B -> 8B run."""
    times, base = times_of(), read_models(load_recipe(TWELVE_TO_EIGHT)).base
    overrides = ["distill.valid_interval=500", "distill.valid_batches=8"]
    estimate = estimate_distillation(twelve_to_eight(*overrides), times)
    parts = {item.name: item.gpu_hours for item in campaign(estimate, base, times)}
    assert parts["distillation"] == pytest.approx(estimate.gpu_hours)
    join_s, write_s = save_seconds(estimate.case.student, estimate.recipe, 256, times)
    assert write_s == pytest.approx(14 * 8.41e9 / 50e9, rel=0.01)
    correct_s = sum(save_seconds(base, estimate.recipe, 256, times))
    saved_s = 121 * (join_s + write_s) + 32 * correct_s
    assert parts["checkpoints"] == pytest.approx(saved_s * 256 / 3600, rel=0.01)
    # A validation of 8 batches takes less than 8 forward and backward passes.
    assert 0.2 < parts["validation"] / (120 * 8 * estimate.step_s * 256 / 3600) < 0.7
    assert parts["reading text"] == 0
    work = sum(value for name, value in parts.items() if name != "start and failures")
    assert parts["start and failures"] == pytest.approx(
        256 / 6 + work / 50_000 * 256 * (1 / 6 + 0.5 * 500 * 3.95 / 3600), rel=0.05
    )
    hidden = estimate_distillation(twelve_to_eight("distill.async_save=true"), times)
    saved = {item.name: item.gpu_hours for item in campaign(hidden, base, times)}["checkpoints"]
    assert saved < 0.8 * parts["checkpoints"]
    cached = estimate_distillation(twelve_to_eight("teacher.placement=cached"), times)
    passes = {item.name: item.gpu_hours for item in campaign(cached, base, times)}["caching the teacher"]
    assert cached.gpu_hours + passes == pytest.approx(estimate.gpu_hours, rel=0.03)
    assert best_interval_s(join_s + write_s, 256, times) / estimate.step_s == pytest.approx(490, rel=0.03)
    slow = Times(
        GPUS["h100"].model_copy(update={"read_ms_per_sample": 2000.0}),
        {"gpu": "h100", "points": [], "gemm_tflops": {}, "copy_tb_s": 3.0},
        same_gpu=True,
    )
    waits = {item.name: item.gpu_hours for item in campaign(estimate, base, slow)}["reading text"]
    assert waits == pytest.approx(
        (60400 * (12 - estimate.step_s) + 15900 * (12 - 3.5)) * 256 / 3600, rel=0.05
    )


def test_warning_about_the_host():
    def warning(*overrides: str) -> str | None:
        times = times_of()
        return host_warning(estimate_distillation(twelve_to_eight(*overrides), times), times)

    assert warning() is None
    assert "the host may limit" in warning("parallel.tp=8", "distill.tp_comm_overlap=false")
    limited = warning("distill.fp8=tensorwise", "parallel.tp=4")
    assert "the host limits the speed: it needs 8.0 ms" in limited
    assert "distill.cuda_graphs" in limited
