"""Whether unfinished stages can resume: checkpoints and progress that do not fit the recipe.

A run that finds them late would already have replaced the artifacts that they were made from.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minitron_mp.artifacts.manifest import Manifest, find_manifest, require_format
from minitron_mp.artifacts.run_folder import RETRAINING, checkpoint_step, is_of_run, newest_checkpoint
from minitron_mp.errors import InputError
from minitron_mp.workflow.changes import accept_option
from minitron_mp.workflow.stage_files import checkpoint_folder

if TYPE_CHECKING:
    from minitron_mp.workflow.graph import StageGraph


def saved_progress_problems(graph: StageGraph, stage: str | None = None, *, force: bool = False) -> list[str]:
    """Return a sentence for each unfinished stage whose saved progress does not fit the recipe.

    It reads the user's files for their fingerprints. Files that cannot be used are left to the other
    checks. stage: the only one that will run; None for all. Progress that it does not affect is
    left out. force: a run of that stage may replace a finished model by one with other settings.
    """
    problems = []
    for name in graph.stages:
        saved = _saved_progress(graph, name)
        if saved is None or stage not in (None, name, *graph.before(name)):
            continue
        try:
            if graph.why_not_done(name) is None:
                continue
            expected = graph.manifest(name)
        except (InputError, OSError):
            continue
        problem = _problem(graph, name, saved, expected)
        if not problem and not (force and name == stage):
            problem = _replaced_model(graph, name, saved)
        if problem:
            problems.append(problem)
    return problems


def _saved_progress(graph: StageGraph, name: str) -> Path | None:
    """Return the newest complete checkpoint of a stage or its progress file; None without one."""
    stage = graph.stages[name]
    if stage.has_checkpoints:
        return newest_checkpoint(checkpoint_folder(graph.recipe, name))
    progress = graph.recipe.root / stage.progress
    return progress if stage.progress and progress.is_file() else None


def _problem(graph: StageGraph, name: str, saved: Path, expected: Manifest) -> str:
    """Return why a stage cannot resume from its saved progress, "" if it can."""
    try:
        manifest = find_manifest(saved)
        if manifest is None:
            return ""
        require_format(saved, manifest)
    except InputError as error:
        return str(error)
    own_changes: list[str] = []
    if graph.stages[name].has_checkpoints:
        step = checkpoint_step(saved)
        expected = expected.accepting(graph.accept, manifest, step).at_step(step)
        own_changes = manifest.changed_settings(expected)
    if manifest.fingerprint == expected.fingerprint:
        return ""
    files, settings = _root_changes(graph, name, manifest, expected)
    advice = ["put the files back"] if files else []
    advice += ["restore the settings"] if settings else []
    option = accept_option(own_changes)
    if option and manifest.inputs == expected.inputs:
        if _is_of_finished(graph, name, saved):
            option = f"`minitron-mp {name} {option} --force`"
        advice.append(f"change them from here on with {option}")
    causes = files + settings
    if not causes:
        inputs = sorted({*manifest.inputs, *expected.inputs})
        changed = [each for each in inputs if manifest.inputs.get(each) != expected.inputs.get(each)]
        causes = [f"the artifacts of {', '.join(changed)} were made again"]
    what = "checkpoints" if graph.stages[name].has_checkpoints else "progress"
    conjunction = " and " if files else ", "
    actions = [conjunction.join(advice), "set another output"] if advice else ["set another output"]
    return (
        f"{name}: {saved.parent} has {what} of another run, so it cannot resume: {'; '.join(causes)}. "
        f"{', '.join(actions).capitalize()}, or delete {saved.parent} to start {name} again"
    )


def _is_of_finished(graph: StageGraph, name: str, saved: Path) -> bool:
    """Return whether a finished run has kept a checkpoint, and --force does not train it again."""
    if not graph.stages[name].has_checkpoints or (saved.parent / RETRAINING).exists():
        return False
    written = find_manifest(graph.paths[name])
    return written is not None and is_of_run(saved, written)


def _replaced_model(graph: StageGraph, name: str, checkpoint: Path) -> str:
    """Return a sentence if a run would resume from a checkpoint that a finished run has kept.

    The run has other settings, because the finished model does not fit the recipe.
    """
    artifact = graph.paths[name]
    written = find_manifest(artifact)
    if written is None or not _is_of_finished(graph, name, checkpoint):
        return ""
    rows = "; ".join(written.changed_settings(graph.manifest(name)))
    return (
        f"{name}: {artifact} is finished with other settings ({rows}), and a run from its checkpoint "
        f"{checkpoint.name} would replace it. Restore the settings, set another output, or run "
        f"`minitron-mp {name}` with --force"
    )


def _root_changes(
    graph: StageGraph, name: str, saved: Manifest, expected: Manifest
) -> tuple[list[str], list[str]]:
    """Return the user's files and the settings that differ, of a stage and of those before it."""
    files: list[str] = []
    settings: dict[str, str] = {}  # row -> first stage with it
    for source in graph.before(name):
        try:
            found = find_manifest(graph.paths[source])
        except InputError:  # its stage reports it
            continue
        if found is not None:
            files += found.changed_sources(graph.manifest(source))
            for row in found.changed_settings(graph.manifest(source)):
                settings.setdefault(row, source)
    for row in saved.changed_settings(expected):
        settings.setdefault(row, name)
    return list(dict.fromkeys(files)), [f"{stage} {row}" for row, stage in settings.items()]
