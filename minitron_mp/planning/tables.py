"""Estimates as table rows, sentences and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.planning.campaign import CampaignItem, total_gpu_hours
from minitron_mp.planning.estimate import Estimate
from minitron_mp.planning.memory import GIB, Parts, uses_transformer_engine
from minitron_mp.planning.published import Comparison
from minitron_mp.planning.times import Times

Scaling = Sequence[tuple[int, Estimate | None]]
"""(GPUs, fastest layout; None if nothing fits)."""

LAYOUT_HEADER = ("layout", "teacher", "arithmetic", "corrected", "tok/s", "GiB", "largest overhead")
"""arithmetic, corrected: seconds of a step."""

SCALING_HEADER = ("GPUs", "layout", "teacher", "arithmetic", "corrected", "tok/s", "largest overhead")

CAMPAIGN_HEADER = ("part", "GPU-hours", "numbers")

PUBLISHED_HEADER = ("run", "GPUs", "layout", "format", "published", "arithmetic", "ratio")
"""published, arithmetic: TFLOP/s per GPU. ratio: of the step times."""


def layout_text(estimate: Estimate) -> str:
    """Return one line with the student's layout, microbatch, recomputation and teacher placement."""
    p = estimate.recipe.parallel
    t = estimate.recipe.teacher
    dp = estimate.case.student_ranks // p.model_ranks
    d = estimate.recipe.distill
    text = f"{_sizes_text(p)} dp {dp}, microbatch {d.micro_batch_size}"
    if d.recompute:
        text += ", recompute" if d.recompute is True else f", recompute {d.recompute}"
    if d.cuda_graphs:
        text += ", CUDA graphs"
    if estimate.case.teacher_ranks:
        return f"{text}; teacher on {estimate.case.teacher_ranks} GPUs ({_sizes_text(t.parallel)})"
    return f"{text}; teacher {t.placement}"


def _sizes_text(p: ParallelConfig) -> str:
    text = f"tp {p.tp} pp {p.pp} cp {p.cp}"
    if p.vpp:
        text += f" vpp {p.vpp}"
    return f"{text} layers {list(p.layers)}" if p.layers else text


def summary_rows(estimate: Estimate, times: Times, price: float | None) -> list[tuple[str, str]]:
    """Return rows (what, value) on speed, budget, memory and cost. price: of a GPU-hour."""
    d = estimate.recipe.distill
    peak = times.hardware.bf16_tflops
    needed = f"{estimate.needed_bytes / GIB:.1f} GiB needed and {times.hardware.reserved_gib:.1f} reserved"
    rows = [
        (
            "step time",
            f"{estimate.step_s:.3f} s for {estimate.tokens:,} tokens (arithmetic: "
            f"{estimate.arithmetic_s:.3f} s, x {estimate.correction:.3f} towards published rates)",
        ),
        ("layer times", estimate.basis + ("" if times.same_gpu else " from another GPU")),
        (
            "layers",
            "Transformer Engine"
            if uses_transformer_engine(estimate.recipe)
            else "memory of local layers, times of Transformer Engine layers",
        ),
        ("throughput", f"{estimate.tokens_per_gpu_s:,.0f} tokens/s/GPU"),
        (
            "utilisation",
            f"{estimate.tflops:,.0f} TFLOP/s/GPU, {estimate.tflops / peak:.1%} of the bf16 peak (MFU)",
        ),
        ("budget", f"{d.steps:,} steps, {d.steps * estimate.tokens / 1e9:,.1f}B tokens"),
        ("distillation", f"{estimate.hours:,.1f} h, {estimate.gpu_hours:,.0f} GPU-hours"),
        ("memory", f"{needed}, of {times.hardware.memory_gib:.1f}"),
    ]
    if price is not None:
        rows.append(("cost", f"{estimate.gpu_hours * price:,.0f} at {price:g} per GPU-hour"))
    return rows


def memory_rows(parts: Parts) -> list[tuple[str, str]]:
    """Return rows (part, GiB), with their sum."""
    rows = [(name, f"{value / GIB:.2f}") for name, value in parts.items() if value]
    return [*rows, ("sum", f"{sum(parts.values()) / GIB:.2f}")]


def seconds_rows(estimate: Estimate) -> list[tuple[str, str, str]]:
    """Return rows (part of a step, seconds, share), largest first."""
    parts = sorted(estimate.seconds.items(), key=lambda part: -part[1])
    return [(name, f"{value:.3f}", f"{value / estimate.arithmetic_s:.1%}") for name, value in parts]


def traffic_rows(estimate: Estimate) -> list[tuple[str, str, str, str]]:
    """Return rows (transfer, link, GB per step, GB/s)."""
    rows = []
    for name, sent in estimate.traffic.items():
        gigabytes = sent.num_bytes / 1e9
        rows.append((name, sent.link, f"{gigabytes:,.2f}", f"{gigabytes / estimate.step_s:,.2f}"))
    return rows


def layout_row(estimate: Estimate) -> tuple[str, ...]:
    """Return a row under LAYOUT_HEADER that fits a terminal of 80 columns."""
    *cells, overhead = _short_cells(estimate)
    return (*cells, f"{estimate.needed_bytes / GIB:.0f}", overhead)


def scaling_rows(sweep: Scaling) -> list[tuple[str, ...]]:
    """Return rows under SCALING_HEADER."""
    return [
        (f"{world:,}", *(_short_cells(estimate) if estimate else ("does not fit", *[""] * 5)))
        for world, estimate in sweep
    ]


def _short_cells(estimate: Estimate) -> tuple[str, ...]:
    p = estimate.recipe.parallel
    d = estimate.recipe.distill
    layout = f"tp{p.tp} pp{p.pp} cp{p.cp}"
    if p.vpp:
        layout += f" v{p.vpp}"
    if p.layers:
        layout += f" last{p.layers[-1]}"
    layout += f" mb{d.micro_batch_size} b{d.global_batch_size}"
    if d.recompute:
        layout += " re" if d.recompute is True else f" re{d.recompute}"
    if d.cuda_graphs:
        layout += " graphs"
    num_teachers = estimate.case.teacher_ranks
    teacher = f"{num_teachers} tp{estimate.recipe.teacher.parallel.tp}" if num_teachers else "colocated"
    overhead, share = estimate.largest_overhead
    steps = f"{estimate.arithmetic_s:.3f}", f"{estimate.step_s:.3f}"
    return (layout, teacher, *steps, f"{estimate.tokens_per_gpu_s:,.0f}", f"{overhead} {share:.0%}")


def campaign_rows(items: Sequence[CampaignItem], price: float | None) -> list[tuple[str, str, str]]:
    """Return rows under CAMPAIGN_HEADER, with their sum. price: of a GPU-hour."""
    rows = [(item.name, f"{item.gpu_hours:,.0f}", item.detail) for item in items]
    total = total_gpu_hours(items)
    cost = "" if price is None else f"cost {total * price:,.0f}"
    return [*rows, ("sum", f"{total:,.0f}", cost)]


def published_rows(compared: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Return rows under PUBLISHED_HEADER. Ratios in brackets do not count for the correction."""
    rows: list[tuple[str, ...]] = []
    for each in compared:
        run = each.run
        ratio = f"{each.ratio:.2f}" if each.counts else f"({each.ratio:.2f})"
        rates = f"{run.tflops:.0f}", f"{run.tflops * each.ratio:.0f}"
        rows.append((run.model, f"{run.world:,}", _sizes_text(run.layout), run.fp8 or "bf16", *rates, ratio))
    return rows


def efficiency_loss(sweep: Scaling) -> str:
    """Return a sentence on the number of GPUs at which throughput per GPU first falls by 10%."""
    fitting = [(world, estimate) for world, estimate in sweep if estimate]
    best = max(estimate.tokens_per_gpu_s for _, estimate in fitting)
    best_world = min(world for world, estimate in fitting if estimate.tokens_per_gpu_s == best)
    for world, estimate in fitting:
        if world > best_world and estimate.tokens_per_gpu_s < 0.9 * best:
            overhead, share = estimate.largest_overhead
            return (
                f"throughput per GPU first falls more than 10% below its best at {world:,} GPUs; "
                f"largest overhead there: {overhead} ({share:.0%} of the step)"
            )
    return "throughput per GPU stays within 10% of its best up to 2,048 GPUs"


def estimate_json(estimate: Estimate) -> dict[str, object]:
    """Return an estimate as plain numbers: seconds and bytes."""
    t = estimate.recipe.teacher
    teacher_ranks = estimate.case.teacher_ranks
    traffic: Mapping[str, Mapping[str, object]] = {
        name: {"link": sent.link, "bytes": sent.num_bytes} for name, sent in estimate.traffic.items()
    }
    return {
        "parallel": estimate.recipe.parallel.model_dump(),
        "micro_batch_size": estimate.recipe.distill.micro_batch_size,
        "recompute": estimate.recipe.distill.recompute,
        "placement": t.placement,
        "student_ranks": estimate.case.student_ranks,
        "teacher_ranks": teacher_ranks,
        "teacher_parallel": t.parallel.model_dump() if teacher_ranks else None,
        "global_batch_size": estimate.recipe.distill.global_batch_size,
        "steps": estimate.recipe.distill.steps,
        "overlap": estimate.recipe.distill.overlap,
        "tp_comm_overlap": estimate.recipe.distill.tp_comm_overlap,
        "cuda_graphs": estimate.recipe.distill.cuda_graphs,
        "fp8": estimate.recipe.distill.fp8,
        "arithmetic_s": estimate.arithmetic_s,
        "correction": estimate.correction,
        "step_s": estimate.step_s,
        "tflops_per_gpu": estimate.tflops,
        "tokens_per_s_per_gpu": estimate.tokens_per_gpu_s,
        "hours": estimate.hours,
        "gpu_hours": estimate.gpu_hours,
        "basis": estimate.basis,
        "memory_bytes": estimate.memory,
        "teacher_memory_bytes": estimate.teacher_memory,
        "seconds": estimate.seconds,
        "wire_bytes": traffic,
        "bottleneck": estimate.largest_overhead[0],
    }
