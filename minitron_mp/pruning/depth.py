"""Choice of the kept layers, and the measurements of the stage `depth`. Needs only numpy."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from minitron_mp.artifacts.files import first_problem, read_json, write_text
from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.config.pruning import DepthConfig, TargetConfig
from minitron_mp.errors import InputError
from minitron_mp.pruning.ranking import ROUNDING_NOISE, close_scores, top_indices


class Trial(BaseModel):
    """The measurements of the model without some layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dropped: list[int]
    """Dropped layers, ascending."""
    loss: float
    """Cross-entropy on text, in nats per token. With the metric task: the mean of -log p of the
    correct options, in nats per item."""
    accuracy: float | None = None
    """Share of the items with a correct answer, with the metric task."""
    next_best: Trial | None = None
    """The second best trial of a greedy round, if the round had more than one."""

    @property
    def rank(self) -> tuple[float, float]:
        """Return the sort key, lowest for the best trial: accuracy if there is one, then loss."""
        return -(self.accuracy or 0.0), self.loss


class DepthTrials(BaseModel):
    """The result of the stage `depth`: the full model, and the model without some of its layers.

    With the method greedy there is one trial per round. It drops the layers of the round before and
    one more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Trial
    trials: list[Trial]

    def ranked(self) -> list[Trial]:
        """Return the trials, the best one first. Equal trials keep their order."""
        return sorted(self.trials, key=lambda trial: trial.rank)

    def save(self, path: Path, manifest: Manifest) -> None:
        content = {"manifest": manifest.model_dump(mode="json"), **self.model_dump(exclude_none=True)}
        write_text(path, json.dumps(content, indent=1))

    @classmethod
    def load(cls, path: Path) -> DepthTrials:
        """Read the file; InputError if it is missing, damaged, or in the format of another version."""
        content = read_json(path, "depth --force")
        if isinstance(content, dict):
            content.pop("manifest", None)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise InputError(
                f"{path} is in another format ({first_problem(error)}); this version reads base and "
                f"trials with {', '.join(Trial.model_fields)}; run `minitron-mp depth --force` again"
            ) from error


def droppable_layers(depth: DepthConfig, num_layers: int, count: int) -> list[int]:
    """Return the layers that are not protected; InputError if they are fewer than `count`."""
    free = list(range(depth.protect_first, num_layers - depth.protect_last))
    if count > len(free):
        raise InputError(
            f"depth.protect_first {depth.protect_first} and protect_last {depth.protect_last} leave "
            f"{len(free)} of {num_layers} layers to drop from, the target drops {count}; "
            "protect fewer, or keep more layers"
        )
    return free


def depth_candidates(
    depth: DepthConfig, num_layers: int, count: int, gone: Collection[int] = ()
) -> list[frozenset[int]]:
    """Return the sets of layers that the stage `depth` drops, one set per trial.

    gone: layers that a greedy search has dropped already.
    """
    free = droppable_layers(depth, num_layers, count)
    if depth.method == "block":
        return [frozenset(range(first, first + count)) for first in free[: len(free) - count + 1]]
    return [frozenset({*gone, layer}) for layer in free if layer not in gone]


def kept_layers(
    cosine: np.ndarray, keep: int, target: TargetConfig, depth: DepthConfig, trials: DepthTrials | None
) -> list[int]:
    """Return the kept layers, ascending. A tie keeps the lower layer. cosine: scores [L]."""
    num_layers = len(cosine)
    count = num_layers - keep
    if target.drop_layers is not None or count == 0:
        dropped = target.drop_layers or []
    elif depth.method == "cosine":
        free = np.array(droppable_layers(depth, num_layers, count))
        dropped = np.setdiff1d(free, free[top_indices(cosine[free], len(free) - count)]).tolist()
    else:
        assert trials is not None, "run the stage depth first"
        if depth.method == "drop":
            dropped = [layer for trial in trials.ranked()[:count] for layer in trial.dropped]
        elif depth.method == "block":
            dropped = trials.ranked()[0].dropped
        else:
            dropped = trials.trials[count - 1].dropped
    return [layer for layer in range(num_layers) if layer not in dropped]


def close_depth_cuts(
    cosine: np.ndarray, keep: int, target: TargetConfig, depth: DepthConfig, trials: DepthTrials | None
) -> list[str]:
    """Return one sentence for each choice of kept_layers() that is inside the rounding noise.

    A choice is between two scores, or two trials. Protected layers take no part.
    """
    count = len(cosine) - keep
    if target.drop_layers is not None or count == 0:
        return []
    if depth.method == "cosine":
        free = droppable_layers(depth, len(cosine), count)
        return close_scores("layers", cosine[free][None], len(free) - count)
    assert trials is not None, "run the stage depth first"
    choices = _choices(depth, count, trials)
    return [_close_choice(best, other) for best, other in choices if _is_close(best, other)]


def _choices(depth: DepthConfig, count: int, trials: DepthTrials) -> list[tuple[Trial, Trial]]:
    """Return (last chosen trial, next best trial) of each decision."""
    if depth.method == "greedy":
        return [(trial, trial.next_best) for trial in trials.trials[:count] if trial.next_best is not None]
    ranked = trials.ranked()
    taken = 1 if depth.method == "block" else count
    return [(ranked[taken - 1], ranked[taken])] if taken < len(ranked) else []


def _is_close(best: Trial, other: Trial) -> bool:
    noise = ROUNDING_NOISE * max(abs(best.loss), abs(other.loss))
    return best.accuracy == other.accuracy and abs(best.loss - other.loss) <= noise


def _close_choice(best: Trial, other: Trial) -> str:
    accuracy = "" if best.accuracy is None else f"the accuracy is {best.accuracy:.1%}, and "
    return (
        f"layers: without {', '.join(map(str, best.dropped))} (chosen) and "
        f"without {', '.join(map(str, other.dropped))} (next best) {accuracy}"
        f"the losses are {best.loss:.9g} and {other.loss:.9g}, closer than rounding noise"
    )
