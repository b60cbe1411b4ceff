"""The command `estimate`: what a distillation needs and how long it takes on so many GPUs, as tables, JSON and a figure. Runs nothing, on a laptop."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron_mp.artifacts.files import write_text
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.console import say, table
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.models.hf_config import read_arch
from minitron_mp.planning.hardware import Times, read_hardware, read_times
from minitron_mp.planning.layouts import (
    GIB,
    LayoutSearch,
    fastest,
    fits,
    layout_problem,
    scaling,
    search_layouts,
    smallest_world,
)
from minitron_mp.planning.memory import uses_transformer_engine
from minitron_mp.planning.step_time import WORK, Estimate, estimate_distillation, estimate_training
from minitron_mp.pruning.search_space import search_candidates
from minitron_mp.pruning.target import resolve_target


def run_estimate(
    recipe: Recipe,
    world: int,
    *,
    gpu: str = "h100",
    hardware_file: Path | None = None,
    times_file: Path | None = None,
    price: float | None = None,
    top: int = 10,
    json_file: Path | None = None,
    plot_file: Path | None = None,
) -> None:
    """Print what the recipe needs on so many GPUs and the best layouts; write the same as JSON, and a figure. price: of a GPU-hour.

    InputError where no layout of so many GPUs is possible, or none fits into their memory.
    """
    if plot_file and plot_file.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {plot_file}: give a name that ends in .png, .svg or .pdf")
    hardware = read_hardware(gpu, hardware_file)
    times = read_times(gpu, hardware, times_file)
    base, teacher, student = read_models(recipe)
    found = search_layouts(student, teacher, recipe, world, times)
    why = layout_problem(student, teacher, recipe, world, times)
    own = None if why else estimate_distillation(student, teacher, recipe, world, times)
    if not found.found:
        raise InputError(_nothing(found, student, teacher, recipe, world, times))

    say(
        f"{world} x {hardware.name}, {student.num_parameters():,} parameters from {teacher.num_parameters():,}; GiB are 2^30 bytes, times are estimates"
    )
    if own is None or not fits(own, times):
        room = hardware.memory_gib - hardware.reserved_gib
        reason = why if own is None else f"{own.needs_bytes / GIB:.1f} GiB of {room:.1f}"
        say(f"the recipe's own layout is impossible: {reason}. Below: the fastest one")
    shown = own if own is not None and fits(own, times) else found.found[0]
    table(f"{layout(shown)}", ("what", "value"), summary(shown, times, price))
    if recipe.correct and not recipe.corrects_meanwhile and not why:
        table("teacher correction, before", ("what", "value"), _correction(base, recipe, world, times, price))
    table(
        "memory of the fullest GPU (activations, logits, buffers: estimates)",
        ("part", "GiB"),
        _memory(shown.memory),
    )
    if shown.teacher_memory:
        table("memory of the teacher's fullest GPU", ("part", "GiB"), _memory(shown.teacher_memory))
    rows = sorted(shown.seconds.items(), key=lambda part: -part[1])
    table(
        "a step",
        ("part", "s", "share"),
        [(name, f"{value:.3f}", f"{value / shown.step_s:.1%}") for name, value in rows],
    )
    if shown.wire:
        rows_of_wire = [
            (name, w.link, f"{w.num_bytes / 1e9:,.2f}", f"{w.num_bytes / 1e9 / shown.step_s:,.2f}")
            for name, w in shown.wire.items()
        ]
        table("sent by a GPU", ("what", "link", "GB a step", "GB/s"), rows_of_wire)
    header = ("layout", "teacher", "s", "tok/s/GPU", "GiB", "held up most by")
    table(
        f"fastest {min(top, len(found.found))} of {len(found.found)} layouts that fit",
        header,
        [_row(e) for e in found.found[:top]],
    )
    if apart := next((e for e in found.found if e.teachers), None):
        say(
            f"fastest with teachers apart: {layout(apart)}, {apart.teachers} : {apart.students}, {apart.step_s:.3f} s a step, held up by {apart.bottleneck[0]}"
        )
    table(
        "layouts tried that are impossible",
        ("why", "layouts"),
        [(why, f"{count:,}") for why, count in found.impossible.most_common()],
    )
    sweep = scaling(student, teacher, recipe, times)
    header = ("GPUs", "layout", "teacher", "s", "tok/s/GPU", "held up most by")
    rows_of_sweep = [
        (f"{n:,}", *_row(e, memory=False)) if e else (f"{n:,}", "does not fit", "", "", "", "")
        for n, e in sweep
    ]
    table("from 8 to 2,048 GPUs, each with its fastest layout", header, rows_of_sweep)
    say(_first_bottleneck(sweep))
    if json_file:
        content = {
            "world": world,
            "hardware": hardware.model_dump(),
            "layer_times": times.about,
            "shown": as_json(shown),
            "own_layout_problem": why,
        }
        content |= {"best": [as_json(e) for e in found.found[:top]], "impossible": dict(found.impossible)}
        content["scaling"] = [{"world": n, **(as_json(e) if e else {})} for n, e in sweep]
        write_text(json_file, json.dumps(content, indent=1))
    if plot_file:
        from minitron_mp.report.figures import write_scaling

        write_scaling(
            plot_file,
            [(n, e.tokens_per_gpu_s, e.seconds) for n, e in sweep if e],
            WORK,
            f"{hardware.name}, {Path(recipe.output).name}",
        )


def read_models(recipe: Recipe) -> tuple[Arch, Arch, Arch]:
    """(what is cut, what is distilled from, the student: the largest candidate of a search) from config.json alone."""
    folders = Path(recipe.model), Path(recipe.teacher.model or recipe.model)
    base, teacher = (read_arch(folder, weights=False) for folder in folders)
    if recipe.search:
        return base, teacher, max(search_candidates(recipe, base), key=lambda arch: arch.num_parameters())
    return base, teacher, resolve_target(base, recipe.target, recipe.parallel.tp, recipe.export.family)


def dry_run_rows(teacher: Arch, student: Arch, recipe: Recipe, world: int) -> list[tuple[str, str]]:
    """The line of a dry run; its layout has been checked."""
    times = read_times("h100", read_hardware("h100"))
    if layout_problem(student, teacher, recipe, world, times):
        return []
    e = estimate_distillation(student, teacher, recipe, world, times)
    what = f"{e.step_s:.2f} s a step, {e.tokens_per_gpu_s:,.0f} tokens/s/GPU, {e.gpu_hours:,.0f} GPU-hours"
    return [("distillation on H100 SXM (estimate)", f"{what}; more: minitron-mp estimate")]


def layout(e: Estimate) -> str:
    """In a line: student's layout, microbatch, recomputation, and where the teacher is."""
    p, t, d = e.recipe.parallel, e.recipe.teacher, e.recipe.distill
    where = f"; teacher on {e.teachers} ({_sizes(t.parallel)})" if e.teachers else f"; teacher {t.placement}"
    return (
        f"{_sizes(p)} dp {e.students // p.model_ranks}, micro batch {d.micro_batch_size}"
        + ", recomputing" * d.recompute
        + where
    )


def _sizes(p: ParallelConfig) -> str:
    return f"tp {p.tp} pp {p.pp} cp {p.cp}" + (f" vpp {p.vpp}" if p.vpp else "")


def summary(e: Estimate, times: Times, price: float | None) -> list[tuple[str, str]]:
    """Rows (what, value)."""
    d = e.recipe.distill
    rows = [
        ("step", f"{e.step_s:.3f} s, {e.tokens:,} tokens"),
        ("times rest on", f"{e.basis} layer times" + ("" if times.same_gpu else " of another GPU")),
        (
            "layers",
            "Transformer Engine"
            if uses_transformer_engine(e.recipe)
            else "local for memory; times are Transformer Engine's",
        ),
        ("speed", f"{e.tokens_per_gpu_s:,.0f} tokens/s/GPU"),
        ("budget", f"{d.steps:,} steps, {d.steps * e.tokens / 1e9:,.1f}B tokens"),
        ("time", f"{e.hours:,.1f} h, {e.gpu_hours:,.0f} GPU-hours"),
        (
            "memory",
            f"{e.needs_bytes / GIB:.1f} GiB and {times.hardware.reserved_gib:.1f} reserved, of {times.hardware.memory_gib:.1f}",
        ),
    ]
    return rows + (
        [("cost", f"{e.gpu_hours * price:,.0f} at {price:g} a GPU-hour")] if price is not None else []
    )


def _correction(
    base: Arch, recipe: Recipe, world: int, times: Times, price: float | None
) -> list[tuple[str, str]]:
    correct = recipe.correct
    assert correct is not None
    if (
        correct.global_batch_size % (correct.micro_batch_size * (world // recipe.parallel.model_ranks))
        or world % recipe.parallel.model_ranks
    ):
        return [("impossible", "its batch does not divide over so many GPUs")]
    step = sum(estimate_training(base, correct, recipe, world, times, None)[0].values())
    hours = step * correct.steps / 3600 * world
    tokens = correct.steps * correct.global_batch_size * recipe.data.sequence_length
    rows = [
        ("step", f"{step:.3f} s"),
        ("budget", f"{correct.steps:,} steps, {tokens / 1e9:,.1f}B tokens"),
        ("GPU-hours", f"{hours:,.0f}"),
    ]
    return rows + ([("cost", f"{hours * price:,.0f}")] if price is not None else [])


def _memory(parts: dict[str, float]) -> list[tuple[str, str]]:
    rows = [(name, f"{value / GIB:.2f}") for name, value in parts.items() if value]
    return [*rows, ("sum", f"{sum(parts.values()) / GIB:.2f}")]


def _row(e: Estimate, *, memory: bool = True) -> tuple[str, ...]:
    """tp.pp.cp and what else there is, short enough for 80 columns."""
    p, d, t = e.recipe.parallel, e.recipe.distill, e.recipe.teacher
    short = (
        f"tp{p.tp} pp{p.pp} cp{p.cp}"
        + f" v{p.vpp}" * bool(p.vpp)
        + f" mb{d.micro_batch_size}" * (d.micro_batch_size > 1)
        + " re" * d.recompute
    )
    name, share = e.bottleneck
    gib = (f"{e.needs_bytes / GIB:.0f}",) if memory else ()
    return (
        short,
        f"{e.teachers} tp{t.parallel.tp}" if e.teachers else "beside",
        f"{e.step_s:.3f}",
        f"{e.tokens_per_gpu_s:,.0f}",
        *gib,
        f"{name} {share:.0%}",
    )


def _first_bottleneck(sweep: Sequence[tuple[int, Estimate | None]]) -> str:
    there = [(n, e) for n, e in sweep if e]
    best = max(e.tokens_per_gpu_s for _, e in there)
    for n, e in there:
        if e.tokens_per_gpu_s < 0.9 * best and n > min(n for n, e in there if e.tokens_per_gpu_s == best):
            return f"a tenth of the best speed a GPU is lost first at {n:,} GPUs, most of it to: {e.bottleneck[0]} ({e.bottleneck[1]:.0%} of the step)"
    return "no tenth of the best speed a GPU is lost up to 2,048 GPUs"


def _nothing(
    found: LayoutSearch, student: Arch, teacher: Arch, recipe: Recipe, world: int, times: Times
) -> str:
    room = times.hardware.memory_gib - times.hardware.reserved_gib
    counted = [f"  - {why}: {count:,} layouts" for why, count in found.impossible.most_common()]
    if found.least_bytes is None:
        unit = times.hardware.gpus_per_node if world > 4 * times.hardware.gpus_per_node else 1
        nearest = sorted(range(unit, 2 * world + 2 * unit, unit), key=lambda n: abs(n - world))[:24]
        near = itertools.islice((n for n in nearest if fastest(student, teacher, recipe, n, times)), 3)
        options = ", ".join(map(str, near)) or "none near it"
        batch = f"distill.global_batch_size {recipe.distill.global_batch_size}"
        return "\n".join(
            [f"no layout is possible on {world} GPUs with {batch}; GPUs that work: {options}", *counted]
        )
    smallest = smallest_world(student, teacher, recipe, times, world)
    there = (
        f"the smallest world that fits is {smallest} GPUs" if smallest else "nothing up to 8,192 GPUs fits"
    )
    there_is = f"{room:.1f} are there ({times.hardware.memory_gib:.1f} less {times.hardware.reserved_gib:.1f} reserved)"
    least = f"{found.least_bytes / GIB:.1f} GiB a GPU at least, {there_is}"
    return "\n".join(
        [f"the models do not fit on {world} x {times.hardware.name}: {least}; {there}", *counted]
    )


def as_json(e: Estimate) -> dict[str, Any]:
    """An estimate in plain numbers: seconds, bytes."""
    p, t, d = e.recipe.parallel, e.recipe.teacher, e.recipe.distill
    chosen = {
        "parallel": p.model_dump(),
        "micro_batch_size": d.micro_batch_size,
        "recompute": d.recompute,
        "placement": t.placement,
    }
    chosen |= {
        "student_ranks": e.students,
        "teacher_ranks": e.teachers,
        "teacher_parallel": t.parallel.model_dump() if e.teachers else None,
    }
    found = {
        "step_s": e.step_s,
        "tokens_per_s_per_gpu": e.tokens_per_gpu_s,
        "hours": e.hours,
        "gpu_hours": e.gpu_hours,
        "basis": e.basis,
    }
    parts = {"memory_bytes": e.memory, "teacher_memory_bytes": e.teacher_memory, "seconds": e.seconds}
    return (
        chosen
        | found
        | parts
        | {
            "wire_bytes": {name: {"link": w.link, "bytes": w.num_bytes} for name, w in e.wire.items()},
            "bottleneck": e.bottleneck[0],
        }
    )
