"""Importance scores, and the plan that says what to keep. Runs on a laptop: numpy only, no torchrun.

Width: 2407.14679 section 2.3 (rank, keep the top). Depth: keep layers. Heads are ranked inside each query group and every
kept group keeps as many, so that grouped-query attention stays regular. A query group (its key, value and queries) scores the l2
norm of its heads' scores, as a head does of its channels'; the papers keep all groups.
Scores agree between layouts to rounding only, so ties break by the lower index, and a cut whose gap is inside the rounding
noise is reported by close_cuts() and close_depth().
"""

from __future__ import annotations

import numpy as np

from minitron_mp.models.arch import Arch
from minitron_mp.pruning.scores import Scores

ROUNDING_NOISE = 1e-5
"""Relative gap at a cut under which float32 sums over another number of ranks may order two scores the other way."""


def top_indices(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the count largest scores [n], ascending; a tie goes to the lower index."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def kept_groups(scores: np.ndarray, teacher: Arch, student: Arch) -> np.ndarray:
    """Query groups that stay, ascending, by the scores of a layer's heads [np]."""
    return top_indices(
        np.linalg.norm(scores.reshape(teacher.num_query_groups, -1), axis=1), student.num_query_groups
    )


def kept_heads(scores: np.ndarray, teacher: Arch, student: Arch) -> list[int]:
    """Heads that stay, ascending: the best of each kept group, by the scores of a layer's heads [np]."""
    groups = scores.reshape(teacher.num_query_groups, -1)
    return [
        int(g * teacher.heads_per_group + h)
        for g in kept_groups(scores, teacher, student)
        for h in top_indices(groups[g], student.heads_per_group)
    ]


def merged_heads(scores: np.ndarray, kept: list[int], teacher: Arch) -> list[tuple[int, int]]:
    """(kept head, pruned head whose residual it takes) in each kept group, mirrored at the cut, by a layer's scores [np].

    2407.14679 section 2.3: with L heads in the order of importance cut to K, head i becomes head_i + (head_i - head_{2K-i+1}) for
    i in [K-(L-K), K]: the last kept takes the first pruned, the one before it the second. The paper's first i names head L+1,
    which is none, so it begins one later; with more pruned than kept heads it begins at 1, and the weakest are lost. The paper does
    this only to queries under grouped-query attention, and so do we: the key and value of a group are still whole.
    """
    pairs: list[tuple[int, int]] = []
    for group in sorted({head // teacher.heads_per_group for head in kept}):
        members = np.arange(teacher.heads_per_group) + group * teacher.heads_per_group
        ranked = members[np.argsort(-scores[members], kind="stable")].tolist()
        count = len(set(ranked) & set(kept))
        pairs += zip(ranked[:count][::-1], ranked[count:])
    return pairs


def close_width_cuts(
    importance: Scores, teacher: Arch, student: Arch, layers: np.ndarray, *, merge: bool
) -> list[str]:
    """One sentence for each cut of a width between two scores nearer than the rounding noise. layers: that stay. merge: the order of heads counts."""
    notes = close_scores("hidden", importance.hidden[None], student.hidden_size)
    for i in layers:
        groups = importance.heads[i].reshape(teacher.num_query_groups, -1)
        kept = groups[kept_groups(importance.heads[i], teacher, student)]
        notes += close_scores(f"ffn of layer {i}", importance.ffn[i][None], student.ffn_hidden_size)
        notes += close_scores(
            f"query groups of layer {i}", np.linalg.norm(groups, axis=1)[None], student.num_query_groups
        )
        notes += close_scores(f"heads of layer {i}", kept, student.heads_per_group, merge=merge)
    return notes


def close_scores(name: str, scores: np.ndarray, count: int, *, merge: bool = False) -> list[str]:
    """Of rows of scores [rows, n], of which the count largest stay."""
    if count == scores.shape[1]:
        return []
    notes, ordered = [], -np.sort(-scores.astype(np.float64), axis=1)
    close = ordered[:, :-1] - ordered[:, 1:] <= ROUNDING_NOISE * np.abs(ordered[:, :-1])
    for row, at in np.argwhere(close):
        pair = f"{ordered[row, at]:.9g} and {ordered[row, at + 1]:.9g}, nearer than rounding"
        if at == count - 1:
            notes.append(f"{name}: the last kept and first cut score are {pair}")
        elif merge and abs(at - (count - 1)) <= min(count, scores.shape[1] - count):
            notes.append(f"{name}: two scores whose order says what is merged are {pair}")
    return notes
