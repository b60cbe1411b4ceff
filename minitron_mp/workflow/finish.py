"""The end of a run: leftovers of finished stages, the report, and the file `finished`."""

from __future__ import annotations

import shutil
import time

from minitron_mp.artifacts.files import write_text
from minitron_mp.artifacts.manifest import find_manifest
from minitron_mp.artifacts.run_folder import RETRAINING, discard_checkpoints
from minitron_mp.console import say
from minitron_mp.data.file_hashes import SHARDS
from minitron_mp.errors import InputError
from minitron_mp.workflow.graph import StageGraph
from minitron_mp.workflow.output_folder import FINISHED
from minitron_mp.workflow.stage_files import checkpoint_folder


def remove_finished(graph: StageGraph) -> None:
    """Delete the file `finished` if a stage of any round must run or cannot run.

    graph: the first round.
    """
    try:
        done = all(
            each.why_not_done(name) is None for each in graph.rounds() for name in each.stages_of_compress()
        )
    except InputError:
        done = False
    if not done:
        (graph.recipe.root / FINISHED).unlink(missing_ok=True)


def discard_leftovers(graph: StageGraph) -> None:
    """Delete checkpoints and shards of finished stages. They exist if a kill came after the last save."""
    for name in graph.own_stages:
        if graph.stages[name].run_share is not None:
            shutil.rmtree(graph.recipe.root / SHARDS / graph.paths[name].name, ignore_errors=True)
        if not graph.stages[name].has_checkpoints:
            continue
        folder = checkpoint_folder(graph.recipe, name)
        if (folder / RETRAINING).exists():
            say(
                f"{name}: the checkpoints of an unfinished `{name} --force` stay in {folder}; run that "
                "command again, or delete the folder"
            )
        else:
            settings = graph.recipe.correct if name == "correct" else graph.recipe.distill
            keep_every = settings.keep_every if settings else 0
            written = find_manifest(graph.paths[name])
            final = written.validation if written else None
            discard_checkpoints(folder, written or graph.manifest(name), keep_every, final)


def finish_run(graph: StageGraph) -> None:
    """Write the report and the file `finished`. graph: the last round."""
    from minitron_mp.report.report import write_report  # imports matplotlib, which only one rank needs

    write_report(graph)
    write_text(graph.recipe.run.root / FINISHED, time.strftime("%Y-%m-%d %H:%M:%S\n"))
