"""The command `estimate`: memory, step time and the best layouts, as tables, JSON and a figure."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from minitron_mp.artifacts.files import write_text
from minitron_mp.config.recipe import Recipe
from minitron_mp.console import say, table
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch
from minitron_mp.models.hf_config import read_arch
from minitron_mp.planning.case import PlanningCase
from minitron_mp.planning.hardware import read_hardware
from minitron_mp.planning.layouts import (
    GIB,
    LayoutSearch,
    fastest_layout,
    fits,
    layout_problem,
    scaling,
    search_layouts,
    smallest_world,
)
from minitron_mp.planning.rounds import (
    ROUNDS_HEADER,
    Models,
    estimate_rounds,
    largest_student,
    round_rows,
)
from minitron_mp.planning.step_time import WORK, Estimate, estimate_distillation, estimate_training
from minitron_mp.planning.tables import (
    LAYOUT_HEADER,
    SCALING_HEADER,
    Scaling,
    efficiency_loss,
    estimate_json,
    layout_row,
    layout_text,
    memory_rows,
    scaling_rows,
    seconds_rows,
    summary_rows,
    traffic_rows,
)
from minitron_mp.planning.times import Times, read_times
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


def run_estimate(recipe: Recipe, options: EstimateOptions) -> None:
    """Print the recipe's cost on options.world GPUs and the best layouts.

    JSON and a figure are written on request. InputError if no layout is possible on this number of
    GPUs, or if none fits into their memory.
    """
    if options.plot_file and options.plot_file.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {options.plot_file}: the name must end in .png, .svg or .pdf")
    hardware = read_hardware(options.gpu, options.hardware_file)
    times = read_times(options.gpu, hardware, options.times_file)
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
    table(layout_text(shown), ("what", "value"), summary_rows(shown, times, options.price))
    if recipe.pruning_base == "correct" and not problem:
        rows = _correction_rows(models.base, recipe, options, times)
        table("teacher correction (before distillation)", ("what", "value"), rows)
    _print_estimate(shown)
    _print_layouts(search, options.top)
    sweep = scaling(case, times)
    table("fastest layout on 8 to 2,048 GPUs (tok/s per GPU)", SCALING_HEADER, scaling_rows(sweep))
    say(efficiency_loss(sweep))
    rounds = estimate_rounds(recipe, models, options.world, times)
    if recipe.rounds:
        table(f"rounds on {options.world} GPUs", ROUNDS_HEADER, round_rows(rounds, options.price))
    if options.json_file:
        content: dict[str, object] = {
            "world": options.world,
            "hardware": hardware.model_dump(),
            "layer_times": times.about,
            "shown": estimate_json(shown),
            "own_layout_problem": problem,
            "best": [estimate_json(estimate) for estimate in search.possible[: options.top]],
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


def _print_estimate(estimate: Estimate) -> None:
    """Print memory, time and traffic of one layout by part."""
    table(
        "memory of the fullest GPU (activations, logits and buffers are estimates)",
        ("part", "GiB"),
        memory_rows(estimate.memory),
    )
    if estimate.teacher_memory:
        table(
            "memory of the fullest GPU of the teacher", ("part", "GiB"), memory_rows(estimate.teacher_memory)
        )
    table("time of a step", ("part", "s", "share"), seconds_rows(estimate))
    if estimate.traffic:
        table("sent per GPU", ("what", "link", "GB per step", "GB/s"), traffic_rows(estimate))


def _print_layouts(search: LayoutSearch, top: int) -> None:
    """Print the fastest layouts, the fastest one with a remote teacher, and the reasons against the
    impossible ones.
    """
    shown = search.possible[:top]
    title = f"fastest {len(shown)} of {len(search.possible):,} layouts that fit (tok/s per GPU)"
    table(title, LAYOUT_HEADER, [layout_row(estimate) for estimate in shown])
    remote = next((estimate for estimate in search.possible if estimate.case.teacher_ranks), None)
    if remote:
        ranks = f"{remote.case.teacher_ranks} : {remote.case.student_ranks}"
        say(
            f"fastest layout with a remote teacher: {layout_text(remote)}; teacher : student GPUs {ranks}, "
            f"{remote.step_s:.3f} s per step, largest overhead: {remote.largest_overhead[0]}"
        )
    rows = [(reason, f"{count:,}") for reason, count in search.impossible.most_common()]
    table("impossible layouts", ("reason", "layouts"), rows)


def _correction_rows(
    base: Arch, recipe: Recipe, options: EstimateOptions, times: Times
) -> list[tuple[str, str]]:
    """Return rows (what, value) on a teacher correction that runs before the distillation."""
    correct = recipe.correct
    assert correct is not None
    model_ranks = recipe.parallel.model_ranks
    unit = correct.micro_batch_size * (options.world // model_ranks)
    if options.world % model_ranks or correct.global_batch_size % unit:
        return [("impossible", f"its global batch does not divide over {options.world} GPUs")]
    step = sum(estimate_training(base, correct, recipe, options.world, times, None).seconds.values())
    gpu_hours = step * correct.steps / 3600 * options.world
    tokens = correct.steps * correct.global_batch_size * recipe.data.sequence_length
    rows = [
        ("step time", f"{step:.3f} s"),
        ("budget", f"{correct.steps:,} steps, {tokens / 1e9:,.1f}B tokens"),
        ("GPU-hours", f"{gpu_hours:,.0f}"),
    ]
    if options.price is not None:
        rows.append(("cost", f"{gpu_hours * options.price:,.0f}"))
    return rows


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
