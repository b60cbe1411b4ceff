"""Sections of the report on the pruned sizes and on the importance scores."""

from __future__ import annotations

import numpy as np

from minitron_mp.models.axes import AXES, Axis
from minitron_mp.pruning.depth import DepthTrials
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.pruning.scores import Scores
from minitron_mp.report.document import Figure, Part, Section, Table
from minitron_mp.report.figures.depth_trials import trials_figure
from minitron_mp.report.figures.importance import (
    kept_layers_figure,
    layer_bars,
    rank_heat_map,
    score_curves,
    unit_heat_map,
)


def pruned_section(plan: PrunePlan, scores: Scores) -> Section:
    """Build the section with sizes before and after, kept layers, and the kept share of importance."""
    shares = {axis.name: _kept_shares(axis, plan, scores) for axis in AXES.values()}
    texts = [_share_text(name, list(by_layer.values())) for name, by_layer in shares.items()]
    per_layer = {name: by_layer for name, by_layer in shares.items() if AXES[name].per_layer}
    parts: list[Part] = [
        Table(("size", "teacher", "student", "kept"), plan.summary()),
        f"Layers dropped (counted from 0): {', '.join(map(str, plan.dropped)) or 'none'}.",
        f"Share of the importance scores that is kept: {'; '.join(texts)}.",
        *(f"Note: {note}." for note in plan.notes),
        kept_layers_figure(plan.teacher.num_layers, per_layer),
    ]
    return Section("What was pruned", parts)


def _kept_shares(axis: Axis, plan: PrunePlan, scores: Scores) -> dict[int, float]:
    """Return kept layer -> kept share of its importance scores."""
    shares = {}
    for layer, units in plan.keep[axis.name].items():
        row = scores[axis.name][layer]
        shares[layer] = float(row[units].sum() / row.sum())
    return shares


def _share_text(name: str, shares: list[float]) -> str:
    spread = f" (layers from {min(shares):.1%} to {max(shares):.1%})" if AXES[name].per_layer else ""
    return f"{name} {np.mean(shares):.1%}{spread}"


def importance_section(plan: PrunePlan, scores: Scores, trials: DepthTrials | None, method: str) -> Section:
    """Build the section with figures of all scores.

    The numbers are in importance.safetensors and depth.json. trials, method: of the stage `depth`.
    """
    cosine = dict(enumerate(scores.layers.tolist()))
    parts: list[Part] = [
        layer_bars("Layers: change of the hidden states", cosine, plan.dropped, "1 - cosine")
    ]
    if trials:
        parts.append(_trials_figure(method, trials, plan))
    for axis in AXES.values():
        parts += _curves(axis, plan, scores)
    parts += [_heat_map(axis, plan, scores) for axis in AXES.values() if axis.per_layer]
    return Section("Importance", parts)


def _curves(axis: Axis, plan: PrunePlan, scores: Scores) -> list[Figure]:
    """Draw scores by rank: of the groups, if the axis has groups, and of the units inside them."""
    teacher, student = plan.teacher, plan.student
    rows = [
        scores[axis.name][layer].reshape(axis.num_groups(teacher, layer), -1)
        for layer in axis.layers(teacher)
    ]
    kept_layers = axis.layers(student)
    keep_groups = [axis.num_groups(student, layer) for layer in kept_layers]
    keep = [axis.num_units(student, layer) // axis.num_groups(student, layer) for layer in kept_layers]
    units = axis.size.units.capitalize()
    if axis.group is None:
        title = f"{units}, one line per layer" if axis.per_layer else units
        return [score_curves(title, [row[0] for row in rows], keep, axis.size.unit)]
    group_scores = [np.linalg.norm(members, axis=1) for members in rows]
    title = f"{axis.group.units.capitalize()}, one line per layer"
    figures = [score_curves(title, group_scores, keep_groups, axis.group.unit)]
    members = [row for groups in rows for row in groups]
    if max(row.size for row in members) > 1:
        title = f"{units}, one line per {axis.group.unit}"
        figures.append(score_curves(title, members, keep, axis.size.unit))
    return figures


def _heat_map(axis: Axis, plan: PrunePlan, scores: Scores) -> Figure:
    """Draw layers x units: units by number if the axis has groups, by rank otherwise."""
    rows = [scores[axis.name][layer] for layer in axis.layers(plan.teacher)]
    title = f"{axis.size.units.capitalize()} of each layer"
    if axis.group is not None:
        return unit_heat_map(title, rows, plan.keep[axis.name], axis.size.unit)
    keep = [axis.num_units(plan.student, layer) for layer in axis.layers(plan.student)]
    return rank_heat_map(title, rows, keep, axis.size.units)


def _trials_figure(method: str, trials: DepthTrials, plan: PrunePlan) -> Figure:
    """Draw the accuracies if a task chose the layers, otherwise the losses."""
    if trials.base.accuracy is None:
        losses = [(trial.dropped, trial.loss) for trial in trials.trials]
        return trials_figure(method, trials.base.loss, losses, plan.layers)
    accuracies = [(trial.dropped, trial.accuracy or 0.0) for trial in trials.trials]
    unit = "accuracy (share of items)"
    return trials_figure(method, trials.base.accuracy, accuracies, plan.layers, unit, higher_is_better=True)
