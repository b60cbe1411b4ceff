"""The variants. Each one changes the size's recipe; some also rewrite an artifact.

random_weights and random_scores replace the output of a stage with one of the same shape. Its
manifest is the same except for `made_by`, so the later stages accept it.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minitron_mp import InputError, Recipe, Scores
from minitron_mp.artifacts.checkpoint import model_state, save_checkpoint
from minitron_mp.artifacts.files import ASSETS
from minitron_mp.artifacts.manifest import require_artifact
from minitron_mp.distributed.world import join_world
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.models.hf_config import read_arch
from minitron_mp.pruning.candidates import Candidate, candidate_target
from minitron_mp.pruning.target import resolve_target
from minitron_mp.workflow.graph import StageGraph

LONGER = 4
"""Factor of tokens for the student that starts from random weights."""
BY_HAND = "experiments/paper_claims"
"""`made_by` of a rewritten artifact."""
SEARCHED = ("best", "largest", "random")


def random_weights(project: StageGraph) -> None:
    """Replace the weights of the pruned student with Megatron-Core's initial weights."""
    path, recipe = project.paths["prune"], project.recipe
    manifest = require_artifact(path, "prune")
    assert manifest.arch is not None
    with join_world(recipe.parallel, seed=recipe.seed) as w:
        model = build_model(
            manifest.arch,
            w,
            ModelOptions(
                precision=recipe.precision,
                sequence_length=recipe.data.sequence_length,
                random_weights=True,
            ),
        )
        rewritten = manifest.model_copy(update={"made_by": BY_HAND})
        save_checkpoint(
            model_state(model.chunks, w),
            path,
            rewritten,
            lambda folder: shutil.copytree(path / ASSETS, folder / ASSETS),
        )


def random_scores(project: StageGraph) -> None:
    """Shuffle the importance scores within each layer, and the scores of the layers."""
    path, chance = project.paths["score"], np.random.default_rng(project.recipe.seed)
    manifest, scores = require_artifact(path, "score"), Scores.load(path)
    shuffled = Scores.from_tensors({name: chance.permuted(row) for name, row in scores.tensors().items()})
    shuffled.save(path, manifest.model_copy(update={"made_by": BY_HAND}))


def as_deep_as_wide(recipe: Recipe) -> dict[str, Any]:
    """Return a depth target with the number of parameters nearest to the width target."""
    teacher = read_arch(Path(recipe.model))
    size = resolve_target(teacher, recipe.target, family=recipe.export.family).num_parameters()
    layers = min(
        range(1, teacher.num_layers),
        key=lambda n: abs(teacher.resized(num_layers=n).num_parameters() - size),
    )
    return {"target": {"num_layers": layers}}


def correction(recipe: Recipe) -> dict[str, Any]:
    """Return a correction with the steps of distillation and a fifth of its learning rate."""
    names = {
        "steps",
        "global_batch_size",
        "micro_batch_size",
        "warmup_steps",
        "weight_decay",
        "checkpoint_interval",
        "logits_precision",
    }
    d = recipe.distill
    return {"correct": {**d.model_dump(include=names), "lr": d.lr / 5, "min_lr": d.min_lr / 5}}


SEARCHES: dict[str, dict[str, Any]] = {
    "toy": {
        "tolerance": 0.3,
        "num_layers": [5, 6],
        "hidden_size": [48, 64],
        "num_samples": 8,
        "micro_batch_size": 8,
        "finalists": 2,
        "steps": 2,
    },
    "cpu": {
        "num_layers": [27, 28, 29, 30],
        "hidden_size": [480, 512, 544, 576],
        "ffn_hidden_size": [960, 1152, 1344, 1536],
        "num_samples": 32,
        "micro_batch_size": 4,
        "steps": 16,
    },
    "h100": {
        "num_layers": [26, 27, 28, 29, 30],
        "hidden_size": [448, 480, 512, 544, 576],
        "ffn_hidden_size": [960, 1056, 1152, 1248, 1344, 1440, 1536],
        "micro_batch_size": 16,
        "finalists": 8,
        "steps": 300,
    },
}
"""Size -> settings of the search. The budget is the number of parameters of the size's target.

The sizes are listed, so that candidates differ by up to 5 % from the budget. If they were solved
for the budget, all candidates would be equally large, and the largest one so only by rounding.
"""


def searching(recipe: Recipe, size: str) -> dict[str, Any]:
    """Return the changes that replace a recipe's target with a search of the same budget."""
    parameters = resolve_target(
        read_arch(Path(recipe.model)), recipe.target, family=recipe.export.family
    ).num_parameters()
    return {"target": {"align": recipe.target.align}, "search": {"parameters": parameters, **SEARCHES[size]}}


def searched(which: str) -> Callable[[Recipe, Path], dict[str, Any]]:
    """Return a function that gives the target of one candidate of a search.json.

    best: the chosen one. largest: most parameters. random: one of the others, by the recipe's seed.
    """

    def change(recipe: Recipe, search: Path) -> dict[str, Any]:
        try:
            candidates = [
                Candidate.model_validate(row) for row in json.loads(search.read_text())["candidates"]
            ]
            best = next(c for c in candidates if c.chosen)
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise InputError(
                f"{search} is not the search.json of a finished search; give the one in its output folder"
            ) from error
        if len(candidates) < 3:
            raise InputError(
                f"{search} has {len(candidates)} candidates; a comparison of best, largest and random needs 3"
            )
        largest = max(candidates, key=lambda c: c.parameters)
        neither = [c for c in candidates if c not in (best, largest)]
        by_name = {"best": best, "largest": largest, "random": random.Random(recipe.seed).choice(neither)}
        picked = by_name[which]
        return {
            "target": candidate_target(picked.arch, recipe.target.align).model_dump(exclude_defaults=True)
        }

    return change


@dataclass(frozen=True)
class Variant:
    """A change of the base recipe.

    changes: recipe key ("distill.kl_weight") -> value; a section is replaced completely.
    derived: functions of the recipe that return more changes.
    search: function of recipe and search.json that returns more changes.
    after: stage -> function that rewrites its artifact.
    plain: whether the plain transformers loop runs, too.
    text: "text" or "shift-text".
    words: whether the last-word task runs; it takes as long as the held-out loss.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    derived: Sequence[Callable[[Recipe], dict[str, Any]]] = ()
    search: Callable[[Recipe, Path], dict[str, Any]] | None = None
    after: dict[str, Callable[[StageGraph], None]] = field(default_factory=dict)
    plain: bool = False
    text: str = "text"
    words: bool = False


AGGREGATIONS = [(batch, sequence) for batch in ("l2", "mean", "var") for sequence in ("mean", "l2", "var")]


def scored(batch: str, sequence: str) -> str:
    return "pruned" if (batch, sequence) == ("l2", "mean") else f"scores {batch} {sequence}"


VARIANTS: dict[str, Variant] = {
    "pruned": Variant(plain=True),
    "random weights": Variant(after={"prune": random_weights}),
    f"random weights, {LONGER} x tokens": Variant(
        derived=[lambda r: {"distill.steps": LONGER * r.distill.steps}], after={"prune": random_weights}
    ),
    "CE": Variant({"distill.kl_weight": 0.0, "distill.ce_weight": 1.0}, plain=True),
    "CE + KL": Variant({"distill.ce_weight": 1.0}, plain=True),
    "contiguous layers": Variant(
        {"depth.method": "block"}, derived=[as_deep_as_wide], plain=True, words=True
    ),
    "scattered layers": Variant({"depth.method": "drop"}, derived=[as_deep_as_wide], words=True),
    "shifted text": Variant(text="shift-text", plain=True),
    "shifted text, corrected teacher": Variant(derived=[correction], text="shift-text"),
    **{
        scored(b, s): Variant({"score.batch_aggregation": b, "score.sequence_aggregation": s})
        for b, s in AGGREGATIONS[1:]
    },
    "random scores": Variant(after={"score": random_scores}),
    **{f"search: {which}": Variant(search=searched(which), plain=which == "best") for which in SEARCHED},
}
