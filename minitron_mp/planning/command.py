"""The command `estimate`: memory, step time and the best layouts, as tables, JSON and a figure."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from minitron_mp.artifacts.files import write_text
from minitron_mp.config.engine_rules import engine_problems as fp8_rule_problems
from minitron_mp.config.recipe import Recipe
from minitron_mp.console import say, table
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch
from minitron_mp.models.hf_config import read_arch
from minitron_mp.planning.advice import host_warning, settings_text
from minitron_mp.planning.campaign import (
    CampaignItem,
    best_campaign,
    campaign,
    correction_problem,
    total_gpu_hours,
    with_fitting_correction,
)
from minitron_mp.planning.case import PlanningCase
from minitron_mp.planning.estimate import WORK, Estimate
from minitron_mp.planning.hardware import GPUS, read_hardware
from minitron_mp.planning.layouts import fits, layout_problem
from minitron_mp.planning.memory import GIB
from minitron_mp.planning.published import KD_TFLOPS, comparisons, published_distillation
from minitron_mp.planning.rounds import (
    ROUNDS_HEADER,
    Models,
    estimate_rounds,
    largest_student,
    round_rows,
)
from minitron_mp.planning.search import (
    LayoutSearch,
    fastest_layout,
    scaling,
    search_layouts,
    smallest_world,
)
from minitron_mp.planning.step_time import estimate_distillation
from minitron_mp.planning.tables import (
    CAMPAIGN_HEADER,
    LAYOUT_HEADER,
    PUBLISHED_HEADER,
    SCALING_HEADER,
    Scaling,
    campaign_rows,
    efficiency_loss,
    estimate_json,
    layout_row,
    layout_text,
    memory_rows,
    published_rows,
    scaling_rows,
    seconds_rows,
    summary_rows,
    traffic_rows,
)
from minitron_mp.planning.times import Times, read_times
from minitron_mp.planning.variants import in_fp8
from minitron_mp.pruning.search_space import possible_students


@dataclass(frozen=True)
class EstimateOptions:
    """Options of the command `estimate`."""

    world: int
    """GPUs."""
    gpu: str = "h100"
    hardware_file: Path | None = None
    times_file: Path | None = None
    price: float | None = None
    """Price of a GPU-hour."""
    top: int = 10
    """Layouts to show."""
    json_file: Path | None = None
    plot_file: Path | None = None
    raw: bool = False
    """Show arithmetic alone, without the correction towards published rates."""


def run_estimate(recipe: Recipe, options: EstimateOptions) -> None:
    """Print the recipe's cost on options.world GPUs and the best layouts.

    JSON and a figure are written on request. InputError if no layout is possible on this number of
    GPUs, or if none fits into their memory.
    """
    if options.plot_file and options.plot_file.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {options.plot_file}: the name must end in .png, .svg or .pdf")
    hardware = read_hardware(options.gpu, options.hardware_file)
    times = read_times(options.gpu, hardware, options.times_file, corrected=not options.raw)
    models = read_models(recipe)
    case = PlanningCase(models.student, models.teacher, recipe, options.world)
    search = search_layouts(case, times)
    problem = layout_problem(case, times)
    if not search.possible:
        raise InputError(_nothing_fits(search, case, times))

    say(
        f"{options.world} x {hardware.name}: student {case.student.num_parameters():,} parameters, teacher "
        f"{case.teacher.num_parameters():,}. GiB are 2^30 bytes; times are estimates."
    )
    shown = _shown_estimate(case, search, times, problem)
    _print_estimate(shown, times, options.price)
    warning = host_warning(shown, times)
    if warning:
        say(warning)
    items = _print_campaign(shown, models.base, times, options.price)
    _print_layouts(search, options.top)
    _print_best(case, search, models.base, times)
    _print_published(options.gpu, times)
    sweep = scaling(case, times)
    table("fastest layout on 8 to 2,048 GPUs (tok/s per GPU)", SCALING_HEADER, scaling_rows(sweep))
    say(efficiency_loss(sweep))
    rounds = estimate_rounds(recipe, models, options.world, times)
    if recipe.rounds:
        table(f"rounds on {options.world} GPUs", ROUNDS_HEADER, round_rows(rounds, options.price))
    if options.json_file:
        best = [estimate_json(estimate) for estimate in search.possible[: options.top]]
        content: dict[str, object] = {
            "world": options.world,
            "hardware": hardware.model_dump(),
            "layer_times": times.about,
            "shown": estimate_json(shown),
            "campaign": {item.name: item.gpu_hours for item in items},
            "own_layout_problem": problem,
            "best": best,
            "impossible": dict(search.impossible),
            "scaling": [_scaling_json(world, estimate) for world, estimate in sweep],
        }
        if recipe.rounds:
            content["rounds"] = {
                each.name: estimate_json(each.estimate) if each.estimate else None for each in rounds
            }
        write_text(options.json_file, json.dumps(content, indent=1))
    if options.plot_file:
        _write_plot(options.plot_file, sweep, f"{hardware.name}, {Path(recipe.output).name}")


def read_models(recipe: Recipe) -> Models:
    """Read the architectures of a recipe from config.json files.

    With a search the student is the largest candidate. In a further round the pruned model is the
    student of the round before. InputError for a list of layers of stages that fits no model.
    """
    base = read_arch(Path(recipe.model), weights=False)
    teacher = read_arch(Path(recipe.teacher.model or recipe.model), weights=False)
    for each in recipe.earlier:
        base = largest_student(each, base)
    candidates = possible_students(recipe, base)
    depths = {arch.num_layers for arch in candidates}
    refuse(
        "this layout does not fit the models:",
        recipe.layer_problems(depths, base.num_layers, teacher.num_layers),
    )
    return Models(base, teacher, max(candidates, key=lambda arch: arch.num_parameters()))


def _shown_estimate(case: PlanningCase, search: LayoutSearch, times: Times, problem: str | None) -> Estimate:
    """Return the estimate of the recipe's layout, or of the fastest layout if that is impossible."""
    reason = problem
    if problem is None:
        estimate = estimate_distillation(case, times)
        if fits(estimate, times):
            return estimate
        needed = f"{estimate.needed_bytes / GIB:.1f} GiB"
        reason = f"it needs {needed} per GPU, {times.hardware.usable_gib:.1f} GiB are available"
    say(f"the recipe's layout is impossible: {reason}. The tables show the fastest layout instead.")
    return search.possible[0]


def _print_estimate(estimate: Estimate, times: Times, price: float | None) -> None:
    """Print a summary, and memory, time and traffic of one layout by part."""
    table(layout_text(estimate), ("what", "value"), summary_rows(estimate, times, price))
    table(
        "memory of the fullest GPU (activations, logits and buffers are estimates)",
        ("part", "GiB"),
        memory_rows(estimate.memory),
    )
    if estimate.teacher_memory:
        table(
            "memory of the fullest GPU of the teacher", ("part", "GiB"), memory_rows(estimate.teacher_memory)
        )
    table("time of a step, arithmetic", ("part", "s", "share"), seconds_rows(estimate))
    if estimate.traffic:
        table("sent per GPU", ("what", "link", "GB per step", "GB/s"), traffic_rows(estimate))


def _print_layouts(search: LayoutSearch, top: int) -> None:
    """Print the fastest layouts, the fastest one with a remote teacher, and the reasons against the
    impossible ones.
    """
    shown = search.possible[:top]
    title = f"fastest {len(shown)} of {search.num_tried:,} layouts (arithmetic and corrected: s a step)"
    table(title, LAYOUT_HEADER, [layout_row(estimate) for estimate in shown])
    remote = search.remote
    if remote:
        ranks = f"{remote.case.teacher_ranks} : {remote.case.student_ranks}"
        say(
            f"fastest layout with a remote teacher: {layout_text(remote)}; teacher : student GPUs {ranks}, "
            f"{remote.step_s:.3f} s per step, largest overhead: {remote.largest_overhead[0]}"
        )
    rows = [(reason, f"{count:,}") for reason, count in search.impossible.most_common()]
    table("impossible layouts", ("reason", "layouts"), rows)


def _print_campaign(shown: Estimate, base: Arch, times: Times, price: float | None) -> list[CampaignItem]:
    """Print the GPU-hours of the whole run in the shown layout, and return their rows.

    If teacher correction is impossible with its own settings, those that fit are used.
    """
    recipe, ranks = shown.recipe, shown.case.student_ranks
    if recipe.correct and recipe.pruning_base == "correct":
        problem = correction_problem(base, recipe.correct, recipe, ranks, times)
        fitting = with_fitting_correction(shown, base, times) if problem else shown
        if problem:
            say(f"teacher correction is impossible in this layout: {problem}")
        if fitting is None:
            return []
        shown = fitting
    items = campaign(shown, base, times)
    table("the whole run", CAMPAIGN_HEADER, campaign_rows(items, price))
    return items


def _print_best(case: PlanningCase, search: LayoutSearch, base: Arch, times: Times) -> None:
    """Print the layouts with the fewest GPU-hours for the whole run, in the recipe's format and in
    FP8.
    """
    rows = [("format of the recipe", search)]
    recipe = case.recipe
    has_fp8 = times.hardware.fp8_tflops and in_fp8(recipe) != recipe
    if has_fp8 and not fp8_rule_problems(in_fp8(recipe)):
        rows.append(("FP8, which changes the numbers", search_layouts(case, times, fp8=True)))
    for name, found in rows:
        best = best_campaign(found.possible, base, times)
        if best is None:
            continue
        total = total_gpu_hours(campaign(best, base, times))
        say(
            f"fewest GPU-hours ({name}): {total:,.0f} for the whole run, {best.tflops:,.0f} TFLOP/s/GPU, "
            f"{best.needed_bytes / GIB:.0f} GiB with {layout_text(best)}; settings: "
            f"{settings_text(best, recipe)}"
        )


def _print_published(gpu: str, times: Times) -> None:
    """Print published rates beside the planner's arithmetic for the same layouts."""
    compared = comparisons(gpu)
    table("published pre-training (TFLOP/s per GPU)", PUBLISHED_HEADER, published_rows(compared))
    uncorrected = read_times("h100", GPUS["h100"], corrected=False)
    ratio = published_distillation(uncorrected).tflops / KD_TFLOPS
    say(
        f"ratio: published / arithmetic step time. Its geometric mean is the correction: "
        f"{times.hardware.correction_bf16:g} in bf16, {times.hardware.correction_fp8:g} in FP8 "
        f"(ratios in brackets do not count). The one published distillation, ModelOpt's 9B -> 7B on 768 "
        f"H100 at tp 8, reached {KD_TFLOPS:.0f} TFLOP/s/GPU, {ratio:.1f} times less than arithmetic says for "
        "12B -> 8B in that layout (docs/planning.md)"
    )


def _nothing_fits(search: LayoutSearch, case: PlanningCase, times: Times) -> str:
    """Return the error text: why no layout is possible, and which numbers of GPUs work."""
    reasons = [f"  - {reason}: {count:,} layouts" for reason, count in search.impossible.most_common()]
    hardware = times.hardware
    if search.least_bytes is None:
        options = ", ".join(map(str, _nearest_worlds(case, times))) or "none near it"
        batch = f"distill.global_batch_size {case.recipe.distill.global_batch_size}"
        title = f"no layout is possible on {case.world} GPUs with {batch}; GPUs that work: {options}"
        return "\n".join([title, *reasons])
    smallest = smallest_world(case, times)
    advice = f"use at least {smallest} GPUs" if smallest else "nothing up to 8,192 GPUs fits"
    available = (
        f"{hardware.usable_gib:.1f} GiB are available "
        f"({hardware.memory_gib:.1f} less {hardware.reserved_gib:.1f} reserved)"
    )
    title = (
        f"the models do not fit on {case.world} x {hardware.name}: they need at least "
        f"{search.least_bytes / GIB:.1f} GiB per GPU, {available}; {advice}"
    )
    return "\n".join([title, *reasons])


def _nearest_worlds(case: PlanningCase, times: Times) -> list[int]:
    """Return up to three numbers of GPUs near the case's on which a layout fits, nearest first."""
    node = times.hardware.gpus_per_node
    unit = node if case.world > 4 * node else 1
    worlds = range(unit, 2 * case.world + 2 * unit, unit)
    nearest = sorted(worlds, key=lambda world: abs(world - case.world))[:24]
    return list(
        itertools.islice((world for world in nearest if fastest_layout(case.with_world(world), times)), 3)
    )


def _scaling_json(world: int, estimate: Estimate | None) -> dict[str, object]:
    return {"world": world, **(estimate_json(estimate) if estimate else {})}


def _write_plot(path: Path, sweep: Scaling, title: str) -> None:
    from minitron_mp.report.figures.scaling import write_scaling_figure

    points = [(world, estimate.tokens_per_gpu_s, estimate.seconds) for world, estimate in sweep if estimate]
    write_scaling_figure(path, points, WORK, title)
