"""What is run: each variant is a change of the size's recipe, and some rewrite an artefact, which no recipe says.

random_weights and random_scores replace what a stage left by something of the same shape under the same manifest, with another `made_by`;
the stages behind it then work on as ever.
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

from minitron_mp import InputError, Recipe, Scores, build_model
from minitron_mp.artifacts.checkpoint import model_state, save_checkpoint
from minitron_mp.artifacts.manifest import require_artifact
from minitron_mp.distributed.world import join_world
from minitron_mp.models.hf_config import read_arch
from minitron_mp.pruning.candidates import Candidate, candidate_target
from minitron_mp.pruning.target import resolve_target
from minitron_mp.workflow.context import ASSETS
from minitron_mp.workflow.graph import StageGraph

LONGER = 4
"""Times the tokens, for the student that starts from random weights."""
BY_HAND = "experiments/paper_claims"
"""In `made_by` of an artefact that an experiment has rewritten."""
SEARCHED = ("best", "largest", "random")


def random_weights(project: StageGraph) -> None:
    """The pruned student again with its sizes and Megatron-Core's initial weights."""
    path, recipe = project.paths["prune"], project.recipe
    found = require_artifact(path, "prune")
    assert found.arch is not None
    with join_world(recipe.parallel, seed=recipe.seed) as w:
        chunks = build_model(
            found.arch,
            w,
            precision=recipe.precision,
            sequence_length=recipe.data.sequence_length,
            random_weights=True,
        )
        made = found.model_copy(update={"made_by": BY_HAND})
        save_checkpoint(
            model_state(chunks, w),
            path,
            made,
            lambda folder: shutil.copytree(path / ASSETS, folder / ASSETS),
        )


def random_scores(project: StageGraph) -> None:
    """Every importance score dealt out at random among the units of its layer, and layers among themselves."""
    path, chance = project.paths["score"], np.random.default_rng(project.recipe.seed)
    found, scores = require_artifact(path, "score"), Scores.load(path)
    dealt = Scores.from_tensors({name: chance.permuted(row) for name, row in scores.tensors().items()})
    dealt.save(path, found.model_copy(update={"made_by": BY_HAND}))


def as_deep_as_wide(recipe: Recipe) -> dict[str, Any]:
    """Fewer layers instead of narrower ones, with the nearest number of parameters."""
    teacher = read_arch(Path(recipe.model))
    size = resolve_target(teacher, recipe.target, family=recipe.export.family).num_parameters()
    layers = min(
        range(1, teacher.num_layers),
        key=lambda n: abs(teacher.resized(num_layers=n).num_parameters() - size),
    )
    return {"target": {"num_layers": layers}}


def correction(recipe: Recipe) -> dict[str, Any]:
    """As many steps as the distillation, at a fifth of its learning rate."""
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
"""Of the search whose candidates are compared, by size of the experiment; its budget are the parameters of the size's target. The sizes are
listed, so that candidates fill the budget's 5 % on both sides: solved for it, all would be as large, and the largest one so by rounding."""


def searching(recipe: Recipe, size: str) -> dict[str, Any]:
    """What makes a recipe with a target one with a search inside the parameters of that target."""
    parameters = resolve_target(
        read_arch(Path(recipe.model)), recipe.target, family=recipe.export.family
    ).num_parameters()
    return {"target": {"align": recipe.target.align}, "search": {"parameters": parameters, **SEARCHES[size]}}


def searched(which: str) -> Callable[[Recipe, Path], dict[str, Any]]:
    """The target of one candidate of a search.json. best: the chosen one; largest: of the most parameters; random: of the others, by the recipe's seed."""

    def change(recipe: Recipe, search: Path) -> dict[str, Any]:
        try:
            found = [Candidate.model_validate(row) for row in json.loads(search.read_text())["candidates"]]
            best = next(c for c in found if c.chosen)
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise InputError(
                f"{search} is no search.json of a search that has finished; give the one in its output folder"
            ) from error
        if len(found) < 3:
            raise InputError(
                f"{search} has {len(found)} candidates; a comparison of best, largest and random needs 3"
            )
        largest = max(found, key=lambda c: c.parameters)
        others = [c for c in found if c not in (best, largest)]
        picked = {"best": best, "largest": largest, "random": random.Random(recipe.seed).choice(others)}[
            which
        ]
        return {
            "target": candidate_target(picked.arch, recipe.target.align).model_dump(exclude_defaults=True)
        }

    return change


@dataclass(frozen=True)
class Variant:
    """changes: key of the recipe ("distill.kl_weight") -> value; a section is replaced as a whole. derived: further ones.

    after: stage -> what then rewrites its artefact. plain: whether the plain transformers loop runs beside it. text: which one.
    words: whether the models guess last words, which costs as much as the held-out loss.
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
