"""Which units stay, by their scores: rank and keep the top (2407.14679 section 2.3). numpy only.

Units of an axis with groups (heads in query groups) are ranked inside each group, and every kept
group keeps as many, so that grouped-query attention stays regular. A group scores the l2 norm of
its units' scores, as a head does of its channels'. The papers keep all groups.
Scores agree between layouts to rounding only. So ties break by the lower index, and
close_width_cuts() reports each cut whose gap is inside the rounding noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minitron_mp.models.arch import Arch
from minitron_mp.models.axes import AXES, NO_LAYER, Axis
from minitron_mp.pruning.scores import Scores

ROUNDING_NOISE = 1e-5
"""Relative gap at a cut under which float32 sums over other ranks may swap two scores."""


def top_indices(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the count largest scores [n], ascending; a tie goes to the lower index."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def kept_units(scores: np.ndarray, groups: int, keep: int, keep_groups: int) -> list[int]:
    """Units that stay, ascending: the best of each kept group.

    scores [n]: of one layer's units, in `groups` groups of equal size. keep of them stay, equally
    many in each of keep_groups groups.
    """
    rows = scores.reshape(groups, -1)
    return [
        int(group * rows.shape[1] + unit)
        for group in top_indices(_group_scores(rows), keep_groups)
        for unit in top_indices(rows[group], keep // keep_groups)
    ]


def merged_units(scores: np.ndarray, kept: Sequence[int], groups: int) -> list[tuple[int, int]]:
    """(kept unit, pruned unit whose residual it takes) in each kept group, mirrored at the cut.

    2407.14679 section 2.3, for heads: with L heads in the order of importance cut to K, head i
    becomes head_i + (head_i - head_{2K-i+1}) for i in [K-(L-K), K]. The last kept takes the first
    pruned, the one before it the second. The paper's first i names head L+1, which is none, so it
    begins one later. With more pruned than kept heads it begins at 1, and the weakest are lost. The
    paper does this only to queries under grouped-query attention, and so do we: the key and value
    of a group are still whole.
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
    """One sentence for each cut of a width between two scores nearer than the rounding noise.

    layers: those that stay. merge: the order of merged units counts, too.
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
    """rows [groups, units of a group] of scores."""
    where = "" if layer == NO_LAYER else f" of layer {layer}"
    group_scores = _group_scores(rows)
    kept = rows[top_indices(group_scores, keep_groups)]
    notes = []
    if axis.group is not None:
        notes += close_scores(f"{axis.group.units}{where}", group_scores[None], keep_groups)
    return notes + close_scores(f"{axis.name}{where}", kept, keep // keep_groups, merge=merge and axis.merges)


def _group_scores(rows: np.ndarray) -> np.ndarray:
    """[groups, units of a group] -> [groups]."""
    return np.linalg.norm(rows, axis=1)


def close_scores(name: str, scores: np.ndarray, count: int, *, merge: bool = False) -> list[str]:
    """One sentence for each close cut in scores [rows, n], of which the count largest stay."""
    if count == scores.shape[1]:
        return []
    notes, ordered = [], -np.sort(-scores.astype(np.float64), axis=1)
    close = ordered[:, :-1] - ordered[:, 1:] <= ROUNDING_NOISE * np.abs(ordered[:, :-1])
    for row, at in np.argwhere(close):
        pair = f"{ordered[row, at]:.9g} and {ordered[row, at + 1]:.9g}, nearer than rounding"
        if at == count - 1:
            notes.append(f"{name}: the last kept and first cut score are {pair}")
        elif merge and abs(at - (count - 1)) <= min(count, scores.shape[1] - count):
            notes.append(f"{name}: two scores whose order decides what is merged are {pair}")
    return notes
