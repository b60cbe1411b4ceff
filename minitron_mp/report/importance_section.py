"""Sections of the report on what was pruned, and on the importance scores that decided it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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


@dataclass(frozen=True)
class LayerAxis:
    """Scores of an axis that is pruned in each layer, and the units that the plan keeps."""

    name: str
    scores: np.ndarray
    """[L, n]."""
    kept: Mapping[int, Sequence[int]]
    """Kept layer -> kept units."""

    def kept_shares(self) -> dict[int, float]:
        """Kept layer -> share of its importance score that is kept."""
        return {
            layer: float(self.scores[layer][units].sum() / self.scores[layer].sum())
            for layer, units in self.kept.items()
        }


def layer_axes(plan: PrunePlan, scores: Scores) -> list[LayerAxis]:
    """The axes that are pruned in each layer."""
    return [
        LayerAxis("ffn", scores.ffn, dict(zip(plan.layers, plan.ffn))),
        LayerAxis("heads", scores.heads, dict(zip(plan.layers, plan.heads))),
    ]


def pruned_section(plan: PrunePlan, scores: Scores) -> Section:
    """Sizes before and after, kept layers, and the share of the importance that is kept."""
    dropped = _dropped_layers(plan)
    shares = {axis.name: axis.kept_shares() for axis in layer_axes(plan, scores)}
    hidden = scores.hidden[plan.hidden].sum() / scores.hidden.sum()
    texts = [f"hidden {hidden:.1%}"]
    for name, by_layer in shares.items():
        values = np.array(list(by_layer.values()))
        texts.append(f"{name} {values.mean():.1%} (layers from {values.min():.1%} to {values.max():.1%})")
    parts: list[Part] = [
        Table(("size", "teacher", "student", "kept"), plan.summary()),
        f"Layers dropped (counted from 0): {', '.join(map(str, dropped)) or 'none'}.",
        f"Share of the importance scores that is kept: {'; '.join(texts)}.",
        *(f"Note: {note}." for note in plan.notes),
        kept_layers_figure(plan.teacher.num_layers, shares),
    ]
    return Section("What was pruned", parts)


def _dropped_layers(plan: PrunePlan) -> list[int]:
    return sorted(set(range(plan.teacher.num_layers)) - set(plan.layers))


def importance_section(plan: PrunePlan, scores: Scores, trials: DepthTrials | None, method: str) -> Section:
    """Figures of all scores; the numbers are in importance.safetensors and depth.json.

    trials, method: of the stage `depth`.
    """
    teacher = plan.teacher
    student = plan.student
    head_scores = scores.heads.reshape(len(scores.heads), teacher.num_query_groups, -1)
    group_scores = np.linalg.norm(head_scores, axis=2)
    heads_of_groups = head_scores.reshape(-1, teacher.heads_per_group)
    parts: list[Part] = [
        layer_bars(
            "Layers: change of the hidden states",
            dict(enumerate(scores.layers.tolist())),
            _dropped_layers(plan),
            "1 - cosine",
        )
    ]
    if trials:
        parts.append(_trials_figure(method, trials, plan))
    parts += [
        score_curves("Hidden channels", scores.hidden[None], student.hidden_size, "channel"),
        score_curves("Neurons (ffn), one line per layer", scores.ffn, student.ffn_hidden_size, "neuron"),
        score_curves(
            "Query groups, one line per layer", group_scores, student.num_query_groups, "query group"
        ),
    ]
    if teacher.heads_per_group > 1:
        parts.append(
            score_curves("Heads, one line per query group", heads_of_groups, student.heads_per_group, "head")
        )
    parts += [
        rank_heat_map("Neurons of each layer", scores.ffn, student.ffn_hidden_size, "neurons"),
        unit_heat_map("Heads of each layer", scores.heads, dict(zip(plan.layers, plan.heads)), "head"),
    ]
    return Section("Importance", parts)


def _trials_figure(method: str, trials: DepthTrials, plan: PrunePlan) -> Figure:
    """Figure of the accuracies if a task chose the layers, otherwise of the losses."""
    if trials.base_accuracy is None:
        return trials_figure(method, trials.base, trials.trials, plan.layers)
    accuracies = [(layers, share) for (layers, _), share in zip(trials.trials, trials.accuracies)]
    return trials_figure(
        method,
        trials.base_accuracy,
        accuracies,
        plan.layers,
        "accuracy (share of items)",
        higher_is_better=True,
    )
