"""Selection of the units with the highest scores (2407.14679 section 2.3). Needs only numpy.

Units of an axis with groups (heads in query groups) are ranked inside each group. Every kept group
keeps the same number of units, because grouped-query attention needs groups of equal size. The
score of a group is the l2 norm of the scores of its units, like the score of a head over its
channels. The papers keep all groups.
Scores of different parallel layouts agree only to rounding. So a tie keeps the lower index, and
close_width_cuts() reports each cut whose gap is inside the rounding noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minitron_mp.models.arch import Arch
from minitron_mp.models.axes import AXES, NO_LAYER, Axis
from minitron_mp.pruning.scores import Scores

ROUNDING_NOISE = 1e-5
"""Relative gap at a cut below which float32 sums in another order may swap two scores."""


def top_indices(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` largest scores [n], ascending. A tie keeps the lower index."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def kept_units(scores: np.ndarray, groups: int, keep: int, keep_groups: int) -> list[int]:
    """Return the kept units, ascending: the best units of each kept group.

    scores [n]: the units of one layer, in `groups` groups of equal size. `keep` units are kept, the
    same number in each of `keep_groups` groups.
    """
    rows = scores.reshape(groups, -1)
    return [
        int(group * rows.shape[1] + unit)
        for group in top_indices(_group_scores(rows), keep_groups)
        for unit in top_indices(rows[group], keep // keep_groups)
    ]


def merged_units(scores: np.ndarray, kept: Sequence[int], groups: int) -> list[tuple[int, int]]:
    """Return pairs (kept unit, pruned unit whose residual is added to it) of each kept group.

    2407.14679 section 2.3, for heads: with L heads in the order of importance cut to K, head i
    becomes head_i + (head_i - head_{2K-i+1}) for i in [K-(L-K), K]. The last kept head is paired
    with the first pruned one, the second last kept head with the second pruned one, and so on. The
    paper's first i would use head L+1, which does not exist, so the pairs begin one later. With
    more pruned than kept heads they begin at 1, and the least important heads have no pair. Under
    grouped-query attention the paper merges only queries, and so does this function, because the
    key and value of a kept group are not pruned.
    """
    size = len(scores) // groups
    pairs: list[tuple[int, int]] = []
    for group in sorted({unit // size for unit in kept}):
        members = np.arange(size) + group * size
        ranked = members[np.argsort(-scores[members], kind="stable")].tolist()
        count = len(set(ranked) & set(kept))
        pairs += zip(ranked[:count][::-1], ranked[count:])
    return pairs


def close_width_cuts(
    scores: Scores, teacher: Arch, student: Arch, layers: Sequence[int], *, merge: bool
) -> list[str]:
    """Return one sentence for each width cut between two scores closer than the rounding noise.

    layers: the kept layers. merge: also report close scores that decide which units are merged.
    """
    notes = []
    for layer, student_layer in [(NO_LAYER, NO_LAYER), *zip(layers, range(len(layers)))]:
        for axis in AXES.values():
            if axis.per_layer == (layer != NO_LAYER):
                row = scores[axis.name][layer]
                groups = axis.num_groups(teacher, layer)
                keep = axis.num_units(student, student_layer)
                keep_groups = axis.num_groups(student, student_layer)
                notes += _close_cuts_of_layer(axis, layer, row.reshape(groups, -1), keep, keep_groups, merge)
    return notes


def _close_cuts_of_layer(
    axis: Axis, layer: int, rows: np.ndarray, keep: int, keep_groups: int, merge: bool
) -> list[str]:
    """Return the sentences for one layer of an axis. rows: scores [groups, units of a group]."""
    where = "" if layer == NO_LAYER else f" of layer {layer}"
    group_scores = _group_scores(rows)
    kept = rows[top_indices(group_scores, keep_groups)]
    notes = []
    if axis.group is not None:
        notes += close_scores(f"{axis.group.units}{where}", group_scores[None], keep_groups)
    return notes + close_scores(f"{axis.name}{where}", kept, keep // keep_groups, merge=merge and axis.merges)


def _group_scores(rows: np.ndarray) -> np.ndarray:
    """Return the score of each group: rows [groups, units of a group] -> [groups]."""
    return np.linalg.norm(rows, axis=1)


def close_scores(name: str, scores: np.ndarray, count: int, *, merge: bool = False) -> list[str]:
    """Return one sentence for each close cut in scores [rows, n]. Each row keeps its `count` largest."""
    if count == scores.shape[1]:
        return []
    notes, ordered = [], -np.sort(-scores.astype(np.float64), axis=1)
    close = ordered[:, :-1] - ordered[:, 1:] <= ROUNDING_NOISE * np.abs(ordered[:, :-1])
    for row, at in np.argwhere(close):
        pair = f"{ordered[row, at]:.9g} and {ordered[row, at + 1]:.9g}, closer than rounding noise"
        if at == count - 1:
            notes.append(f"{name}: the last kept and first cut score are {pair}")
        elif merge and abs(at - (count - 1)) <= min(count, scores.shape[1] - count):
            notes.append(f"{name}: two scores that decide which units are merged are {pair}")
    return notes
