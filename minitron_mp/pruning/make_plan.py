"""Scores and a target -> the prune plan. Needs only numpy."""

from __future__ import annotations

from minitron_mp.config.pruning import DepthConfig, TargetConfig
from minitron_mp.models.arch import Arch
from minitron_mp.models.axes import AXES, NO_LAYER, Axis
from minitron_mp.pruning.depth import DepthTrials, close_depth_cuts, kept_layers
from minitron_mp.pruning.plan import Kept, Pairs, PrunePlan, mergeable_axes
from minitron_mp.pruning.ranking import close_width_cuts, kept_units, merged_units
from minitron_mp.pruning.scores import Scores
from minitron_mp.pruning.target import resolve_target


def make_plan(
    scores: Scores,
    teacher: Arch,
    target: TargetConfig,
    tp: int = 1,
    family: str | None = None,
    depth: DepthConfig | None = None,
    trials: DepthTrials | None = None,
) -> PrunePlan:
    """Return the plan that keeps the layers and units with the highest scores.

    tp: the tensor parallel size of the student, for alignment. family: the export family, if it
    limits the sizes. depth, trials: how the dropped layers are chosen if the target does not list
    them (default: the lowest 1 - cosine). InputError lists every reason why the target is not
    possible.
    """
    scores.check(teacher)
    student = resolve_target(teacher, target, tp, family)
    depth = depth or DepthConfig()
    layers = kept_layers(scores.layers, student.num_layers, target, depth, trials)
    notes = close_depth_cuts(scores.layers, student.num_layers, target, depth, trials)
    notes += close_width_cuts(scores, teacher, student, layers, merge=target.merge_heads)
    keep = {axis.name: _keep(axis, scores, teacher, student, layers) for axis in AXES.values()}
    merge = {}
    if target.merge_heads:
        merge = {name: _merge(AXES[name], scores, teacher, keep[name]) for name in mergeable_axes()}
    return PrunePlan(teacher=teacher, student=student, layers=layers, keep=keep, merge=merge, notes=notes)


def _keep(axis: Axis, scores: Scores, teacher: Arch, student: Arch, layers: list[int]) -> Kept:
    """Return the kept units of an axis in each kept layer."""
    kept = {}
    for student_layer, layer in enumerate(layers if axis.per_layer else [NO_LAYER]):
        kept[layer] = kept_units(
            scores[axis.name][layer],
            axis.num_groups(teacher, layer),
            axis.num_units(student, student_layer),
            axis.num_groups(student, student_layer),
        )
    return kept


def _merge(axis: Axis, scores: Scores, teacher: Arch, kept: Kept) -> Pairs:
    return {
        layer: merged_units(scores[axis.name][layer], units, axis.num_groups(teacher, layer))
        for layer, units in kept.items()
    }
