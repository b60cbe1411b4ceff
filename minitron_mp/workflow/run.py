"""Stages on the ranks of a job: one by itself, or all that are not done.

A single stage refuses inputs that are missing or made from something else, naming the field.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron_mp.artifacts.files import write_text
from minitron_mp.artifacts.manifest import discard_checkpoints
from minitron_mp.artifacts.run_log import append_record
from minitron_mp.config.recipe import Recipe, load_recipe, save_recipe
from minitron_mp.console import say, speaks
from minitron_mp.errors import InputError
from minitron_mp.workflow.graph import StageGraph
from minitron_mp.workflow.stages.plan import plan_student

FINISHED = "finished"
"""Beside the artefacts when `compress` has reached its end; for scripts that start it again until then."""


def run_stage(name: str, recipe: Recipe, *, force: bool = False) -> Path:
    """Run one stage (a key of STAGES or OPTIONAL) on all ranks of the job; the path of its artefact.

    Done already: nothing happens, unless force. Under torchrun every rank calls it.
    """
    project = StageGraph(recipe)
    project.require_stage(name)
    if name == "plan" and not speaks():
        return project.paths[name]  # needs no ranks: one process does it
    with nullcontext() if name == "plan" else _world(recipe) as world, _may_leave(world):
        if world is None or world.role == "student":
            _run(name, project, world, force=force)
        elif name == "distill":
            _join(recipe, world, force=force)
    return project.paths[name]


def compress(recipe: Recipe) -> Path:
    """All stages from a Hugging Face teacher to a Hugging Face student, report.md and report.html; skips what is done. Reached by all ranks."""
    project = StageGraph(recipe)
    project.check()
    with _world(recipe) as world, _may_leave(world):
        if world.role != "student":
            _join(recipe, world)
            return project.paths["export"]
        _agree(world, lambda: project.check(world.job_size))
        _agree(world, lambda: _open(recipe))
        _agree(world, lambda: _forget_finished(project))
        say(
            f"{recipe.root}: stop it when you like, the same command goes on from the last finished stage and checkpoint"
        )
        for name in project.stages:
            _run(name, project, world, force=False)
            if name == ("texts" if "texts" in project.stages else "data"):
                _agree(world, project.check_text)
        for name in ("correct", "distill"):  # left when a kill came just after the model was written
            if name in project.stages:
                _agree(
                    world,
                    lambda name=name: discard_checkpoints(
                        recipe.root / "checkpoints" / name, project.manifest(name)
                    ),
                )
        _agree(world, lambda: _report(project))
        _agree(world, lambda: write_text(recipe.root / FINISHED, time.strftime("%Y-%m-%d %H:%M:%S\n")))
    return project.paths["export"]


def _forget_finished(project: StageGraph) -> None:
    """Take the mark away when a stage has to run, or cannot."""
    try:
        done = all(project.why_not_done(name) is None for name in project.stages)
    except InputError:
        done = False
    if not done:
        (project.recipe.root / FINISHED).unlink(missing_ok=True)


@contextmanager
def _may_leave(world: Any) -> Iterator[None]:
    """What ends early inside ends well: one line, and the stop file is obeyed. The roles of a job still meet."""
    from minitron_mp.distributed.preemption import Preempted

    try:
        yield
    except Preempted as left:
        leaving = world.preemption
        if world.channel is not None and not leaving.met:
            world.channel.exchange("distill", False, timeout_s=None)
        if world.is_main:
            leaving.stop_file.unlink(missing_ok=True)
        say(f"{left}; the same command goes on from there")


def _report(project: StageGraph) -> None:
    from minitron_mp.report.report import (
        write_report,  # brings the drawing library, which one rank needs, at the end
    )

    write_report(project)


def _open(recipe: Recipe) -> None:
    """The output folder with the resolved recipe in it."""
    try:
        recipe.root.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, recipe.root / "recipe.yaml")
    except OSError as error:
        raise InputError(f"the output folder {recipe.root} cannot be written: {error}") from error


def _run(name: str, project: StageGraph, world: Any, *, force: bool) -> None:
    """One stage on all ranks. Rank 0 decides, from the files that it sees; the others follow."""
    differences = _agree(world, lambda: _decide(name, project, force))
    if differences is not None and world is not None:
        world.preemption.check(f"before {name}", world.is_main)
    active = (
        _active(project.recipe, world, differences is not None)
        if name == "distill" and world.channel is not None
        else {}
    )
    if differences is None:
        say(f"{name}: done, {project.paths[name]}")
        return
    for row in differences:
        say(f"{name}: again, for {row}")
    _agree(world, lambda: _open(project.recipe))  # for a stage by itself, too: the report names the file
    start = time.monotonic()
    if name == "plan":
        _agree(world, lambda: plan_student(project))
    else:
        from minitron_mp.workflow.context import StageContext
        from minitron_mp.workflow.stages.all_stages import RUN

        manifest = _agree(world, lambda: project.manifest(name))
        RUN[name](StageContext(project.recipe, world, project.paths, manifest, active))
    seconds = time.monotonic() - start
    _agree(world, lambda: _note(name, project, world, seconds))
    say(f"{name}: {project.paths[name]} in {seconds:.1f} s")


def _note(name: str, project: StageGraph, world: Any, seconds: float) -> None:
    """Keep for the report how the artefact was made."""
    job: dict[str, Any] = {"ranks": 1, "ranks_per_node": 1, "layout": {}, "device": ""}
    if name != "plan":
        from minitron_mp.distributed.launcher import ranks_per_node
        from minitron_mp.evaluation.prefill_speed import device_name

        layout = project.recipe.parallel.model_dump(exclude_defaults=True)
        job = {
            "ranks": world.job_size,
            "ranks_per_node": ranks_per_node(),
            "layout": layout,
            "device": device_name(world),
        }
    append_record(project.recipe.root, name, project.manifest(name).fingerprint, seconds, **job)


def _decide(name: str, project: StageGraph, force: bool) -> list[str] | None:
    """None when there is nothing to do; otherwise why (the differences from what lies there). InputError on wrong inputs."""
    differences = project.why_not_done(name)
    if differences is None and not force:
        return None
    project.require_inputs(name)
    return differences or []


def _agree(world: Any, decide: Callable[[], Any]) -> Any:
    """Rank 0's answer on every rank; without a world this process is the only one."""
    if world is None:
        return decide()
    from minitron_mp.distributed.sync import on_rank_0

    return on_rank_0(decide, takes_long=True)  # fingerprints of large models, figures


def co_student_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """Role -> recipe of all students of a remote teacher; siblings take its settings from the first one."""
    siblings = {
        f"sibling {path}": load_recipe(path).model_copy(update={"teacher": recipe.teacher})
        for path in recipe.teacher.siblings
    }
    return {"student": recipe, **siblings}


def _join(recipe: Recipe, world: Any, *, force: bool = False) -> None:
    """The ranks of a remote teacher and of siblings: wait until the student comes to distill, and take part."""
    from minitron_mp.workflow.context import StageContext
    from minitron_mp.workflow.stages.all_stages import RUN

    if world.role != "teacher":
        _run("distill", StageGraph(co_student_recipes(recipe)[world.role]), world, force=force)
    elif active := _active(recipe, world, True):
        project = StageGraph(recipe)
        manifest = _agree(world, lambda: project.manifest("distill"))
        RUN["distill"](StageContext(recipe, world, project.paths, manifest, active))


def _active(recipe: Recipe, world: Any, mine: bool) -> dict[str, Recipe]:
    """The students that are not done; every rank of the job calls. The others may be at work for hours before they come."""
    said = world.channel.exchange("distill", mine, timeout_s=None)
    world.preemption.met = True
    return {role: own for role, own in co_student_recipes(recipe).items() if said[role]}


@contextmanager
def _world(recipe: Recipe) -> Iterator[Any]:
    """This rank's world: all ranks of the job in the recipe's layout; or those of its role, when the teacher has ranks of its own.

    SIGTERM is noted from now on; before, while the ranks find each other, it ends the process as usual.
    """
    from minitron_mp.distributed.launcher import num_job_ranks
    from minitron_mp.distributed.preemption import watch_for_preemption
    from minitron_mp.distributed.roles import join_roles
    from minitron_mp.distributed.world import join_world

    t = recipe.teacher
    if not t.is_remote:
        with join_world(recipe.parallel, seed=recipe.seed) as w, watch_for_preemption(recipe.root) as leaving:
            yield replace(w, preemption=leaving)
        return
    job_size = num_job_ranks()
    others = {**t.siblings, "teacher": t.ranks_in(job_size)}
    layouts = {
        role: (others.get(role.removeprefix("sibling "), 0), own.parallel)
        for role, own in co_student_recipes(recipe).items()
    }
    layouts["student"] = (t.student_ranks or max(0, job_size - sum(others.values())), recipe.parallel)
    layouts["teacher"] = (others["teacher"], t.parallel)
    roots = {role: own.root for role, own in co_student_recipes(recipe).items()}
    with (
        join_roles(layouts, seed=recipe.seed, stream_timeout_s=t.timeout_s) as w,
        watch_for_preemption(roots.get(w.role, recipe.root)) as leaving,
    ):
        yield replace(w, preemption=leaving)
