"""Section of the report on an architecture search."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minitron_mp.models.axes import AXES, Axis
from minitron_mp.pruning.candidates import front
from minitron_mp.report.document import Figure, Section, Table
from minitron_mp.report.figures.pareto import pareto_figure

Candidate = Mapping[str, Any]
"""A candidate in search.json: name, arch (fields of Arch), parameters, memory_gib, pruned_loss,
distilled ([{steps, loss}]), chosen, latency_s (or None). Losses are in nats per token."""

Value = Callable[[Candidate], float]

SEARCH_HEADER = (
    "candidate",
    "parameters",
    "memory, GiB",
    "layers",
    *(axis.name if axis.group is None else f"{axis.name} / {axis.group.units}" for axis in AXES.values()),
    "loss after pruning",
    "loss distilled",
    "steps",
    "latency (ms)",
    "chosen",
)

SEARCH_NOTE = (
    "Candidates of the search: those distilled longest first, then by loss. A candidate is on the "
    "Pareto front if no other candidate is at least as good on both axes and better on one."
)


def search_section(candidates: Sequence[Candidate], budget: str) -> Section:
    """Build the section with a table of candidates, best first, and the Pareto fronts.

    budget: parameters, memory_gib or latency_ms. Losses after different numbers of steps cannot be
    compared, so there is one front of the candidates distilled longest, and one of all candidates
    after pruning.
    """
    figures = []
    for axis_label, size in _size_axes(candidates, budget):
        for moment, group, loss in _loss_groups(candidates):
            title = f"Loss {moment} by {axis_label.partition(' (')[0]}"
            figures.append(_front_figure(title, group, axis_label, size, loss))
    rows = [_row(candidate) for candidate in sorted(candidates, key=_order)]
    return Section("Search", [SEARCH_NOTE, Table(SEARCH_HEADER, rows), *figures])


def last_distillation(candidate: Candidate) -> Mapping[str, Any] | None:
    """Return the measurement after the most steps of distillation, or None."""
    return max(candidate["distilled"], key=lambda measurement: measurement["steps"], default=None)


def _order(candidate: Candidate) -> tuple[int, float]:
    last = last_distillation(candidate)
    return (-last["steps"], last["loss"]) if last else (0, candidate["pruned_loss"])


def _row(candidate: Candidate) -> tuple[str, ...]:
    """Return the cells of a row under SEARCH_HEADER."""
    arch = candidate["arch"]
    last = last_distillation(candidate)
    latency_s = candidate["latency_s"]
    return (
        candidate["name"],
        f"{candidate['parameters']:,}",
        f"{candidate['memory_gib']:.2f}",
        f"{arch['num_layers']:,}",
        *(_size_text(arch, axis) for axis in AXES.values()),
        f"{candidate['pruned_loss']:.4f}",
        f"{last['loss']:.4f}" if last else "",
        f"{last['steps']:,}" if last else "",
        "" if latency_s is None else f"{latency_s * 1e3:.1f}",
        "yes" if candidate["chosen"] else "",
    )


def _size_text(arch: Mapping[str, Any], axis: Axis) -> str:
    """Return the units of an axis, and its groups if it has any. arch: fields of Arch."""
    return " / ".join(f"{arch[size.field]:,}" for size in reversed(axis.sizes))


def _size_axes(candidates: Sequence[Candidate], budget: str) -> list[tuple[str, Value]]:
    """Return (label, value of a candidate) of each x axis."""
    axes: list[tuple[str, Value]] = [("parameters (millions)", lambda c: c["parameters"] / 1e6)]
    if budget == "memory_gib":
        axes.append(("memory (GiB)", lambda c: c["memory_gib"]))
    if all(candidate["latency_s"] is not None for candidate in candidates):
        axes.append(("latency (ms)", lambda c: c["latency_s"] * 1e3))
    return axes


def _loss_groups(candidates: Sequence[Candidate]) -> list[tuple[str, list[Candidate], Value]]:
    """Return (time of the measurement, candidates, loss of a candidate) of each figure."""
    finite = [
        candidate
        for candidate in candidates
        if all(math.isfinite(measurement["loss"]) for measurement in candidate["distilled"])
    ]
    groups: list[tuple[str, list[Candidate], Value]] = [("after pruning", finite, lambda c: c["pruned_loss"])]
    all_steps = [measurement["steps"] for c in candidates for measurement in c["distilled"]]
    if all_steps:
        longest = max(all_steps)
        losses = {}
        finalists = []
        for candidate in finite:
            last = last_distillation(candidate)
            if last and last["steps"] == longest:
                finalists.append(candidate)
                losses[candidate["name"]] = last["loss"]
        groups.append((f"after {longest:,} steps of distillation", finalists, lambda c: losses[c["name"]]))
    return groups


def _front_figure(
    title: str, candidates: Sequence[Candidate], axis_label: str, size: Value, loss: Value
) -> Figure:
    points = [(c["name"], size(c), loss(c), c["chosen"]) for c in candidates]
    return pareto_figure(title, points, axis_label, "loss (nats per token)", front(points))
