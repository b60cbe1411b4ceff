"""Artifacts of earlier rounds that a round uses: shared ones, and those with a student.

An artifact with a student has in later rounds the name of the command that makes it, such as
"distill --round first".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minitron_mp.config.rounds import of_round
from minitron_mp.workflow.settings import text_entries

if TYPE_CHECKING:
    from minitron_mp.workflow.graph import StageGraph

Place = tuple["StageGraph", str]
"""The round that writes an artifact, and the name of its stage there."""


def artifacts_of_earlier_rounds(graph: StageGraph) -> dict[str, Place]:
    """Return the artifacts of the earlier rounds that depend on a student, by the command."""
    return {
        of_round(name, earlier.recipe.round_name): (earlier, name)
        for earlier in graph.earlier
        for name in earlier.own_stages
        if not (earlier.stages[name].shared or earlier.stages[name].in_last_round)
    }


def shared_artifacts(graph: StageGraph) -> dict[str, Place]:
    """Return the artifacts that this round does not make itself, by stage."""
    shared: dict[str, Place] = {}
    for name, stage in graph.stages.items():
        candidates = [earlier for earlier in graph.earlier if name in earlier.own_stages]
        if stage.shared == "always" and candidates:
            shared[name] = candidates[0], name
        elif stage.shared == "if equal":
            equal = [earlier for earlier in candidates if _is_equal(name, graph, earlier, shared)]
            if equal:
                shared[name] = equal[0], name
    return shared


def _is_equal(name: str, graph: StageGraph, earlier: StageGraph, shared: dict[str, Place]) -> bool:
    """Return whether a stage has the same settings and inputs in both rounds. It reads no text."""
    stage = graph.stages[name]
    inputs = graph.inputs(name)
    if stage.settings(graph.recipe) != stage.settings(earlier.recipe) or inputs != earlier.inputs(name):
        return False
    if any(_place(source, graph, shared) != earlier.place(source) for source in inputs):
        return False
    recipes = (graph.recipe, earlier.recipe)
    paths: Sequence[object] = [
        {key: files.absolute_paths for key, files in stage.sources(recipe).items()} for recipe in recipes
    ]
    if paths[0] != paths[1]:
        return False
    is_text = "text" in stage.sources(graph.recipe)
    held_out = name == "texts"
    return not is_text or text_entries(recipes[0], held_out) == text_entries(recipes[1], held_out)


def _place(name: str, graph: StageGraph, shared: dict[str, Place]) -> Place:
    return shared.get(name, (graph, name))
