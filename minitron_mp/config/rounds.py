"""The section rounds: rounds after the first one, each a recipe with other values of some keys.

merged() makes the recipe of a round, which the stages read like any other recipe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_mp.config.base import Section

FIRST = "first"
"""Name of the round of the recipe itself."""

ROUNDS = "rounds"
"""Folder in the output folder with a folder for each further round."""

Keys = dict[str, Any]
"""Keys and values of a section of the recipe. The section checks them."""

_PARTS = ("calibration", "train", "valid")


class RoundConfig(Section):
    """A further round of the run: it starts from the student of the round before.

    A round with `target` or `search` prunes this student and trains the result. A round without them
    only trains it. The teacher is that of the run. The sections have the keys of the recipe's
    sections of the same name. A key that is not given has its value in the recipe, not in the round
    before.
    """

    data: Keys = {}
    """Keys of `data` with other values, such as sequence_length. Other text is tokenized into the
    folder of the round."""
    parallel: Keys = {}
    """Keys of `parallel` with other values. The number of ranks stays that of the job."""
    score: Keys = {}
    """Keys of `score` with other values."""
    depth: Keys = {}
    """Keys of `depth` with other values."""
    target: Keys = {}
    """Sizes of the student of this round, or a budget. It replaces the recipe's `target` and
    `search`."""
    search: Keys = {}
    """Search of the sizes of this round. It replaces the recipe's `target` and `search`."""
    distill: Keys = {}
    """Keys of `distill` with other values."""
    teacher: Keys = {}
    """Keys of `teacher` with other values, such as placement. The model stays the same."""
    evaluate: Keys = {}
    """Keys of `evaluate` with other values."""
    export: Keys = {}
    """Keys of `export` with other values."""


def of_round(stage: str, name: str) -> str:
    """Return the command that runs a stage in a round. It is also the name of its artifact in the
    stages of later rounds.
    """
    return f"{stage} --round {name}"


def split_command(artifact: str) -> tuple[str, str]:
    """Return the stage and the round in the name of an artifact of an earlier round; "" for its own."""
    stage, _, name = artifact.partition(" --round ")
    return stage, name


def merged(values: Mapping[str, Any], name: str, changes: RoundConfig) -> dict[str, Any]:
    """Return the values of the recipe of a round.

    values: those that the user gave in the recipe. changes: those of the round.
    """
    result = {key: value for key, value in values.items() if key not in ("rounds", "target", "search")}
    result["output"] = str(Path(values["output"]) / ROUNDS / name)
    for section in RoundConfig.model_fields:
        own = getattr(changes, section)
        if own:
            result[section] = {**_kept(result.get(section) or {}, own), **own}
    return result


def _kept(section: Mapping[str, Any], own: Keys) -> dict[str, Any]:
    """Return the recipe's values of a section without those that the round's own keys replace.

    They are the two ways to give text, and the parameters of another divergence.
    """
    replaced: set[str] = set()
    if "source" in own:
        replaced |= set(_PARTS)
    if own.keys() & set(_PARTS):
        replaced |= {"source", "valid_fraction", "valid_tokens"}
    if "divergence" in own:
        replaced.add("divergence_parameters")
    return {key: value for key, value in section.items() if key not in replaced}


def round_problems(rounds: Mapping[str, RoundConfig]) -> list[str]:
    """Return the problems of the names of rounds, and of keys that belong to the whole run."""
    problems = []
    for name, changes in rounds.items():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
            problems.append(f"rounds: the name {name!r} becomes a folder name; use letters, digits, _ and -")
        if name == FIRST:
            problems.append(f"rounds: the name {FIRST} is that of the recipe itself; use a different name")
        problems += [
            f"rounds.{name}.teacher.{key}: every round has the teacher of the run; remove it"
            for key in ("model", "siblings")
            if key in changes.teacher
        ]
        if changes.target and changes.search:
            problems.append(f"rounds.{name}: target and search exclude each other; drop one of the two")
    return problems
