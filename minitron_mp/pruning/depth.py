"""Importance scores, and the plan that says what to keep. Runs on a laptop: numpy only, no torchrun.

Width: 2407.14679 section 2.3 (rank, keep the top). Depth: keep layers. Heads are ranked inside each query group and every
kept group keeps as many, so that grouped-query attention stays regular. A query group (its key, value and queries) scores the l2
norm of its heads' scores, as a head does of its channels'; the papers keep all groups.
Scores agree between layouts to rounding only, so ties break by the lower index, and a cut whose gap is inside the rounding
noise is reported by close_cuts() and close_depth().
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from minitron_mp.artifacts.files import read_json, write_text
from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.config.pruning import DepthConfig, TargetConfig
from minitron_mp.errors import InputError
from minitron_mp.pruning.ranking import ROUNDING_NOISE, close_scores, top_indices


class DepthTrials(BaseModel):
    """The stage `depth`: losses without some layers. base: with all. trials: (layers left out, loss).

    Losses are cross-entropies on text, in nats a token; or, with the metric task, means of -log p of the right options, in nats an
    item, and then accuracies has the share of items that is right in each trial. greedy: one trial a round, each with the layers of
    the one before and one more; second has the next best of each round, but of a last one that had no other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: float
    trials: list[tuple[list[int], float]]
    base_accuracy: float | None = None
    accuracies: list[float] = []
    second: list[tuple[list[int], float]] = []
    second_accuracies: list[float] = []

    def ranked(self) -> list[int]:
        """Numbers of the trials, the best one first: by accuracy where there is one, then by loss, then in order."""
        return sorted(
            range(len(self.trials)),
            key=lambda i: (-self.accuracies[i] if self.accuracies else 0.0, self.trials[i][1]),
        )

    def save(self, path: Path, manifest: Manifest) -> None:
        write_text(
            path, json.dumps({"manifest": manifest.model_dump(mode="json"), **self.model_dump()}, indent=1)
        )

    @classmethod
    def load(cls, path: Path) -> DepthTrials:
        content = read_json(path, "depth --force")
        return cls.model_validate({name: value for name, value in content.items() if name != "manifest"})


def droppable_layers(depth: DepthConfig, num_layers: int, count: int) -> list[int]:
    """Layers that are not protected; InputError when they are fewer than `count`, which are to go."""
    free = list(range(depth.protect_first, num_layers - depth.protect_last))
    if count > len(free):
        raise InputError(
            f"depth.protect_first {depth.protect_first} and protect_last {depth.protect_last} leave {len(free)} of {num_layers} layers that may go, "
            f"the target drops {count}; protect fewer, or keep more layers"
        )
    return free


def depth_candidates(
    depth: DepthConfig, num_layers: int, count: int, gone: Collection[int] = ()
) -> list[frozenset[int]]:
    """What the stage `depth` measures: sets of layers to leave out. gone: those that a greedy search has dropped already."""
    free = droppable_layers(depth, num_layers, count)
    if depth.method == "block":
        return [frozenset(range(first, first + count)) for first in free[: len(free) - count + 1]]
    return [frozenset({*gone, layer}) for layer in free if layer not in gone]


def kept_layers(
    cosine: np.ndarray,
    num_layers: int,
    keep: int,
    target: TargetConfig,
    depth: DepthConfig,
    trials: DepthTrials | None,
) -> np.ndarray:
    """Layers of the student, ascending; a tie goes to the lower layer."""
    count = num_layers - keep
    if target.drop_layers is not None or count == 0:
        dropped = np.array(target.drop_layers or [], int)
    elif depth.method == "cosine":
        free = np.array(droppable_layers(depth, num_layers, count))
        dropped = np.setdiff1d(free, free[top_indices(cosine[free], len(free) - count)])
    else:
        assert trials is not None, "run the stage depth first"
        ranked = trials.ranked()
        if depth.method == "drop":
            dropped = np.array([trials.trials[i][0][0] for i in ranked[:count]])
        else:
            dropped = np.array(trials.trials[ranked[0] if depth.method == "block" else count - 1][0])
    return np.setdiff1d(np.arange(num_layers), dropped)


def close_depth_cuts(
    cosine: np.ndarray,
    num_layers: int,
    keep: int,
    target: TargetConfig,
    depth: DepthConfig,
    trials: DepthTrials | None,
) -> list[str]:
    """One sentence for each choice of kept_layers() between two scores, or two trials, nearer than the rounding noise; among the layers that may go."""
    count = num_layers - keep
    if target.drop_layers is not None or count == 0:
        return []
    if depth.method == "cosine":
        free = droppable_layers(depth, num_layers, count)
        return close_scores("layers", cosine[free][None], len(free) - count)
    assert trials is not None, "run the stage depth first"
    found, second = (
        list(zip(tried, shares or [1.0] * len(tried)))
        for tried, shares in ((trials.trials, trials.accuracies), (trials.second, trials.second_accuracies))
    )
    if depth.method == "greedy":
        pairs = list(zip(found, second))[:count]
    else:
        ranked, last = [found[i] for i in trials.ranked()], 1 if depth.method == "block" else count
        pairs = list(zip(ranked[last - 1 : last], ranked[last : last + 1]))
    notes = []
    for ((chosen, loss), share), ((other, other_loss), other_share) in pairs:
        if share == other_share and abs(loss - other_loss) <= ROUNDING_NOISE * max(
            abs(loss), abs(other_loss)
        ):
            alike = f"the accuracy is {share:.1%}, and " if trials.accuracies else ""
            without = f"without {', '.join(map(str, chosen))} (chosen) and without {', '.join(map(str, other))} (next best)"
            notes.append(
                f"layers: {without} {alike}the losses are {loss:.9g} and {other_loss:.9g}, nearer than rounding"
            )
    return notes
