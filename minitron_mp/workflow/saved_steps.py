"""Models of saved steps of distill: --step of the commands export, evaluate and harness."""

from __future__ import annotations

from pathlib import Path

from minitron_mp.artifacts.manifest import Change, Manifest, find_manifest
from minitron_mp.artifacts.run_folder import (
    best_checkpoint,
    checkpoint_step,
    complete_checkpoints,
    newest_checkpoint,
)
from minitron_mp.errors import InputError
from minitron_mp.workflow.graph import StageGraph
from minitron_mp.workflow.stage_files import checkpoint_folder

BEST = "best"
"""Name of the saved step with the lowest held-out loss."""


def at_saved_step(graph: StageGraph, step: str) -> StageGraph:
    """Return the same recipe with the student of a saved step as the artifact of distill.

    evaluate writes evaluation_step_N.json, and export writes student_hf_step_N. step: a number, or
    BEST. The final model is a saved step, too. InputError if the step was not saved.
    """
    number, folder = _saved_step(graph, step)
    changed = StageGraph(graph.recipe)
    changed.set_step("distill", number, _changes(graph))
    changed.paths["distill"] = folder
    changed.saved_step = number
    for name in ("evaluate", "export"):
        path = graph.paths[name]
        changed.paths[name] = path.with_name(f"{path.stem}_step_{number}{path.suffix}")
        changed.add_settings(name, {"step": number})
    return changed


def saved_step_number(graph: StageGraph, step: str) -> int:
    """Return the number of a saved step. step: as in at_saved_step()."""
    return _saved_step(graph, step)[0]


def _changes(graph: StageGraph) -> list[Change]:
    """Return the settings of distill that changed during its run, with --accept."""
    newest = newest_checkpoint(checkpoint_folder(graph.recipe, "distill"))
    manifest = _final_manifest(graph)
    if manifest is None and newest is not None:
        manifest = find_manifest(newest)
    return manifest.changes if manifest is not None else []


def _final_manifest(graph: StageGraph) -> Manifest | None:
    """Return the manifest of the final model; None if the run that wrote it had other settings."""
    manifest = find_manifest(graph.paths["distill"])
    if manifest is None or manifest.fingerprint != graph.manifest("distill").fingerprint:
        return None
    return manifest


def _saved_step(graph: StageGraph, step: str) -> tuple[int, Path]:
    """Return the number of a saved step, and the checkpoint or artifact with its model."""
    folder, artifact = checkpoint_folder(graph.recipe, "distill"), graph.paths["distill"]
    manifest = _final_manifest(graph)
    final = manifest.validation if manifest is not None else None
    final_step = final.step if final is not None else graph.recipe.distill.steps
    if step == BEST:
        best = best_checkpoint(folder, final)
        if best is not None:
            return checkpoint_step(best), best
        if final is not None:
            return final.step, artifact
        raise InputError(
            f"--step best: no saved step in {graph.recipe.root} was validated; give a number, or set "
            "distill.valid_interval before the run"
        )
    saved = {checkpoint_step(path): path for path in complete_checkpoints(folder)}
    if manifest is not None:
        saved[final_step] = artifact
    if not step.isdecimal() or int(step) not in saved:
        steps = ", ".join(map(str, sorted(saved))) or "none"
        raise InputError(
            f"--step {step}: this is not a saved step of distill; give best or a saved step: {steps}"
        )
    return int(step), saved[int(step)]
