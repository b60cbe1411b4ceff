"""Recipes of variants, their text, and artifacts that variants share."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from texts import HELD_OUT, last_words, stdlib_by_package
from variants import BY_HAND, VARIANTS, Variant, searching

from minitron_mp import InputError, Recipe, load_recipe, make_recipe, run_stage
from minitron_mp.artifacts.manifest import find_manifest, require_artifact
from minitron_mp.workflow.graph import StageGraph

HERE = Path(__file__).parent
SHARED = ("import", "data", "correct", "score", "depth", "search")
"""Stages whose artifacts are shared by all variants with the same settings."""


def recipe_of(args: argparse.Namespace, output: Path, name: str, seed: int) -> Recipe:
    """Return the size's recipe with its text and the changes of the variant."""
    variant = VARIANTS[name]
    base = load_recipe(HERE / f"{args.size}.yaml", [*args.set, f"seed={seed}"])
    train, valid = text_of(args, output, variant)
    tasks = {}
    if variant.words:
        task = output / "text" / f"last_words_{variant.text}_{base.evaluate.task_items}.jsonl"
        tasks["last words"] = str(last_words(valid, task, base.evaluate.task_items or 100))
    values = base.model_dump()
    changes = {
        "model": args.model or base.model,
        "output": str(output / "runs" / slug(name, seed)),
        "data": {**values["data"], "calibration": [str(train)], "train": [str(train)], "valid": [str(valid)]},
        "evaluate.tasks": tasks,
        # The sample settings of `depth` are for methods that measure losses.
        **({} if "depth.method" in variant.changes else {"depth": {}}),
        **variant.changes,
    }
    recipe = make_recipe(changed(values, changes), name)
    for derive in variant.derived:
        recipe = make_recipe(changed(recipe.model_dump(), derive(recipe)), name)
    return recipe


def search_of(args: argparse.Namespace, output: Path, recipe: Recipe, seed: int) -> Path:
    """Return the search.json to compare: the given one, or that of a search of this seed.

    The search runs unless it is finished. Its budget is the parameters of the recipe's target.
    """
    if args.search:
        return args.search
    values = {**searching(recipe, args.size), "output": str(output / "searches" / str(seed))}
    # The other variants compute scores on their training text. Text that ranks students must be new
    # to all of them.
    values["data"] = {
        **recipe.data.model_dump(),
        "source": recipe.data.train,
        "valid_fraction": HELD_OUT,
        "calibration": [],
        "train": [],
        "valid": [],
    }
    project = StageGraph(make_recipe(changed(recipe.model_dump(), values), "search"))
    project.check()
    project.recipe.root.mkdir(parents=True, exist_ok=True)
    for stage in [*project.before("search"), "search"]:
        run_shared(project, stage, output / "shared")
    return project.paths["search"]


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Set dotted keys in values, and return it."""
    for key, value in changes.items():
        *path, last = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[last] = value
    return values


def text_of(args: argparse.Namespace, output: Path, variant: Variant) -> tuple[Path, Path]:
    pair = args.shift_text if variant.text == "shift-text" else args.text
    train, valid = pair or stdlib_by_package(output / "text")
    if missing := [str(path) for path in (train, valid) if not path.exists()]:
        raise InputError(
            f"--{variant.text}: there is no {' and no '.join(missing)}; "
            "give .txt or .jsonl files or folders of them"
        )
    if train.resolve() == valid.resolve():
        raise InputError(
            f"--{variant.text}: {train} is both training and held-out text; give two, of different authors"
        )
    return train, valid


def run_shared(project: StageGraph, stage: str, shared: Path) -> None:
    """Run a stage. Early stages share their artifacts by symbolic links to the folder `shared`."""
    path = project.paths[stage]
    common = shared / f"{project.manifest(stage).fingerprint}-{path.name}"
    if stage in SHARED and common.exists() and not path.exists():
        path.symlink_to(common.resolve())
    run_stage(stage, project.recipe)
    if find_manifest(path) is None:  # SIGTERM, or a stop file
        raise SystemExit(f"{stage} stopped early; run the same command to resume")
    if (
        stage in SHARED
        and not path.is_symlink()
        and not common.exists()
        and require_artifact(path, stage).made_by != BY_HAND
    ):
        shared.mkdir(exist_ok=True)
        path.rename(common)
        path.symlink_to(common.resolve())


def base_mark(args: argparse.Namespace) -> str:
    """Return a fingerprint of the base recipe. Results with different ones are not compared.

    It excludes defaults, so that a setting of a later version does not change it. If a default
    changes that SIZE.yaml does not set, set the old value in SIZE.yaml, or the results do not
    compare.
    """
    values = load_recipe(HERE / f"{args.size}.yaml", args.set).model_dump(
        mode="json", exclude={"model", "output", "seed"}, exclude_defaults=True
    )
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def slug(name: str, seed: int) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in f"{name} {seed}").split())
