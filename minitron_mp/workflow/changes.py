"""Changes to an unfinished training run: other settings from here on, and an earlier checkpoint.

This module needs neither torch nor ranks.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_mp.artifacts.files import write_text
from minitron_mp.artifacts.manifest import MANIFEST
from minitron_mp.artifacts.run_folder import RETRAINING, STEPS, checkpoint_step
from minitron_mp.config.recipe import Recipe
from minitron_mp.console import say
from minitron_mp.errors import InputError
from minitron_mp.workflow.stage_files import checkpoint_folder

if TYPE_CHECKING:
    from minitron_mp.workflow.graph import StageGraph

ACCEPTABLE = (
    "lr",
    "min_lr",
    "warmup_steps",
    "schedule",
    "decay_steps",
    "decay_shape",
    "steps",
    "global_batch_size",
    "clip_grad",
    "weight_decay",
    "skip_batches",
)
"""Settings of a training run that may change when it resumes."""


@dataclass(frozen=True)
class ResumeOptions:
    """How a training stage resumes.

    accept: settings that may differ from those of its checkpoint. from_step: step of an older
    checkpoint to resume from. None: the newest one.
    """

    accept: tuple[str, ...] = ()
    from_step: int | None = None


NEWEST = ResumeOptions()
"""Resume from the newest checkpoint, with the same settings."""


def accepted_names(text: str, recipe: Recipe) -> tuple[str, ...]:
    """Return the names in the option --accept. InputError for one that must not change."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    wrong = [name for name in names if not _is_acceptable(name)]
    if wrong:
        raise InputError(
            f"--accept {','.join(wrong)}: not a setting that may change during a run; give some of "
            f"{', '.join(ACCEPTABLE)} (correct.lr for a teacher that is trained in distill)"
        )
    if "global_batch_size" in names and recipe.teacher.placement == "cached":
        raise InputError(
            "--accept global_batch_size: teacher.placement cached has the signals of equal batches on disk; "
            "set another placement, or keep the batch size"
        )
    return names


def accept_option(rows: Sequence[str]) -> str:
    """Return the option that accepts changed settings; "" if there are none or one must not change.

    rows: 'lr: 1, here 2' of Manifest.changed_settings().
    """
    names = [row.partition(":")[0] for row in rows]
    return f"--accept {','.join(names)}" if names and all(map(_is_acceptable, names)) else ""


def _is_acceptable(name: str) -> bool:
    return name.removeprefix("correct.") in ACCEPTABLE


def prepare_resume(graph: StageGraph, stage: str, options: ResumeOptions, *, force: bool) -> None:
    """Move the checkpoints aside from which a training stage must not resume.

    These are the checkpoints after options.from_step, or with force all that a finished stage has
    kept. One process calls it, which holds the lock of the output folder.
    """
    folder = checkpoint_folder(graph.recipe, stage)
    is_retraining = force and graph.stages[stage].has_checkpoints and graph.why_not_done(stage) is None
    if options.from_step is not None:
        go_back(graph, stage, options.from_step, force=force)
    elif is_retraining and not (folder / RETRAINING).exists() and any(folder.glob(STEPS)):
        go_back(graph, stage, 0, force=True)
    if is_retraining:  # so that the same command resumes after a stop
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RETRAINING, "")


def rewind(graphs: Sequence[StageGraph], stage: str, step: int) -> None:
    """Go back to a step in the runs of all students of a teacher; nothing moves if one cannot.

    graphs: the student's, and those of its siblings, which take part in distill only. Finished
    students stay as they are, unless all are finished, which is an InputError.
    """
    if any(graph.stages[stage].meets_roles for graph in graphs if stage in graph.stages):
        graphs = [graph for graph in graphs if graph.why_not_done(stage) is not None] or graphs
    else:
        graphs = graphs[:1]
    for graph in graphs:
        _later_checkpoints(graph, stage, step, False)
    for graph in graphs:
        go_back(graph, stage, step)


def go_back(graph: StageGraph, stage: str, step: int, *, force: bool = False) -> None:
    """Move the checkpoints after a step into a new folder beside them, with the metrics.

    The next run of the stage resumes from the step. One process calls it, which holds the lock of
    the output folder. step: 0 to start the stage again. force: allow it for a finished stage.
    """
    later = _later_checkpoints(graph, stage, step, force)
    if not later:
        say(f"{stage}: there are no checkpoints after step {step}")
        return
    aside = _new_folder(checkpoint_folder(graph.recipe, stage))
    for curve in graph.stages[stage].curves(graph.recipe):
        metrics = graph.recipe.root / curve.file
        if metrics.is_file():
            shutil.copy(metrics, aside / metrics.name)
    for path in later:
        path.rename(aside / path.name)
    moved = ", ".join(str(checkpoint_step(path)) for path in later)
    say(
        f"{stage}: the checkpoints after the steps {moved} and the metrics are now in {aside}; delete it "
        "when you do not need them"
    )


def _later_checkpoints(graph: StageGraph, stage: str, step: int, force: bool) -> list[Path]:
    """Return the checkpoints after a step. InputError if the stage cannot go back to it."""
    graph.require_stage(stage)
    if not graph.stages[stage].has_checkpoints:
        trained = " or ".join(name for name, one in graph.stages.items() if one.has_checkpoints)
        raise InputError(f"the stage {stage} has no checkpoints; give a training stage: {trained}")
    if graph.why_not_done(stage) is None and not force:
        raise InputError(f"{stage} is finished; add --force to `{stage}` to train it again from step {step}")
    folder = checkpoint_folder(graph.recipe, stage)
    paths = sorted(folder.glob(STEPS))
    complete = [checkpoint_step(path) for path in paths if (path / MANIFEST).is_file()]
    if step and step not in complete:
        steps = ", ".join(map(str, complete))
        advice = f"give one of the steps {steps}" if complete else "the stage starts from its first step"
        raise InputError(f"{folder} has no checkpoint after step {step}; {advice}")
    return [path for path in paths if checkpoint_step(path) > step]


def _new_folder(folder: Path) -> Path:
    """Make and return the first folder set_aside_N that does not exist."""
    number = 1
    while (folder / f"set_aside_{number}").exists():
        number += 1
    aside = folder / f"set_aside_{number}"
    aside.mkdir()
    return aside
