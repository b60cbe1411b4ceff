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

from minitron_mp import artifact, candidates, records
from minitron_mp.config import Recipe, load_recipe, save_recipe
from minitron_mp.console import say, speaks, table
from minitron_mp.errors import InputError
from minitron_mp.plan import Importance, PrunePlan, Trials, exportable, make_plan
from minitron_mp.project import Project

FINISHED = "finished"
"""Beside the artefacts when `compress` has reached its end; for scripts that start it again until then."""


def run_stage(name: str, recipe: Recipe, *, force: bool = False) -> Path:
    """Run one stage (a key of STAGES or OPTIONAL) on all ranks of the job; the path of its artefact.

    Done already: nothing happens, unless force. Under torchrun every rank calls it.
    """
    project = Project(recipe)
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
    project = Project(recipe)
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
                    lambda name=name: artifact.discard_checkpoints(
                        recipe.root / "checkpoints" / name, project.manifest(name)
                    ),
                )
        _agree(world, lambda: _report(project))
        _agree(
            world, lambda: artifact.write_text(recipe.root / FINISHED, time.strftime("%Y-%m-%d %H:%M:%S\n"))
        )
    return project.paths["export"]


def _forget_finished(project: Project) -> None:
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
    from minitron_mp.leaving import Left

    try:
        yield
    except Left as left:
        leaving = world.leaving
        if world.bridge is not None and not leaving.met:
            world.bridge.exchange("distill", False, timeout_s=None)
        if world.is_main:
            leaving.stop_file.unlink(missing_ok=True)
        say(f"{left}; the same command goes on from there")


def _report(project: Project) -> None:
    from minitron_mp.report import (
        write_report,
    )  # brings the drawing library, which one rank needs, at the end

    write_report(project)


def _open(recipe: Recipe) -> None:
    """The output folder with the resolved recipe in it."""
    try:
        recipe.root.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, recipe.root / "recipe.yaml")
    except OSError as error:
        raise InputError(f"the output folder {recipe.root} cannot be written: {error}") from error


def plan(project: Project) -> PrunePlan:
    """Importance -> plan.json. Numpy only: runs on a laptop."""
    teacher = artifact.require(project.paths["score"], "score").arch
    assert teacher is not None
    recipe = project.recipe
    trials = Trials.load(project.paths["depth"]) if "depth" in project.stages else None
    found = project.paths.get("search")
    target = candidates.target_of(candidates.chosen(found), recipe.target.align) if found else recipe.target
    result = make_plan(
        Importance.load(project.paths["score"]),
        teacher,
        target,
        recipe.parallel.tp,
        recipe.export.family,
        recipe.depth,
        trials,
    )
    exportable(result.student, recipe.export.family)
    result.save(project.paths["plan"], project.manifest("plan").model_copy(update={"arch": result.student}))
    table("plan", ("size", "teacher", "student", "kept"), result.summary())
    if dropped := sorted(set(range(teacher.num_layers)) - set(result.layers)):
        say(f"layers that go (from 0): {', '.join(map(str, dropped))}")
    for note in result.notes:
        say(f"note: {note}")
    return result


def _run(name: str, project: Project, world: Any, *, force: bool) -> None:
    """One stage on all ranks. Rank 0 decides, from the files that it sees; the others follow."""
    differences = _agree(world, lambda: _decide(name, project, force))
    if differences is not None and world is not None:
        world.leaving.check(f"before {name}", world.is_main)
    active = (
        _active(project.recipe, world, differences is not None)
        if name == "distill" and world.bridge is not None
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
        _agree(world, lambda: plan(project))
    else:
        from minitron_mp import stages
        from minitron_mp.job import Job

        manifest = _agree(world, lambda: project.manifest(name))
        stages.RUN[name](Job(project.recipe, world, project.paths, manifest, active))
    seconds = time.monotonic() - start
    _agree(world, lambda: _note(name, project, world, seconds))
    say(f"{name}: {project.paths[name]} in {seconds:.1f} s")


def _note(name: str, project: Project, world: Any, seconds: float) -> None:
    """Keep for the report how the artefact was made."""
    job: dict[str, Any] = {"ranks": 1, "ranks_per_node": 1, "layout": {}, "device": ""}
    if name != "plan":
        from minitron_mp.parallel import ranks_per_node
        from minitron_mp.speed import device_name

        layout = project.recipe.parallel.model_dump(exclude_defaults=True)
        job = {
            "ranks": world.job_size,
            "ranks_per_node": ranks_per_node(),
            "layout": layout,
            "device": device_name(world),
        }
    records.note(project.recipe.root, name, project.manifest(name).fingerprint, seconds, **job)


def _decide(name: str, project: Project, force: bool) -> list[str] | None:
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
    from minitron_mp.parallel import on_main

    return on_main(decide, takes_long=True)  # fingerprints of large models, figures


def students_of(recipe: Recipe) -> dict[str, Recipe]:
    """Role -> recipe of all students of a remote teacher; siblings take its settings from the first one."""
    siblings = {
        f"sibling {path}": load_recipe(path).model_copy(update={"teacher": recipe.teacher})
        for path in recipe.teacher.siblings
    }
    return {"student": recipe, **siblings}


def _join(recipe: Recipe, world: Any, *, force: bool = False) -> None:
    """The ranks of a remote teacher and of siblings: wait until the student comes to distill, and take part."""
    from minitron_mp import stages
    from minitron_mp.job import Job

    if world.role != "teacher":
        _run("distill", Project(students_of(recipe)[world.role]), world, force=force)
    elif active := _active(recipe, world, True):
        project = Project(recipe)
        manifest = _agree(world, lambda: project.manifest("distill"))
        stages.RUN["distill"](Job(recipe, world, project.paths, manifest, active))


def _active(recipe: Recipe, world: Any, mine: bool) -> dict[str, Recipe]:
    """The students that are not done; every rank of the job calls. The others may be at work for hours before they come."""
    said = world.bridge.exchange("distill", mine, timeout_s=None)
    world.leaving.met = True
    return {role: own for role, own in students_of(recipe).items() if said[role]}


@contextmanager
def _world(recipe: Recipe) -> Iterator[Any]:
    """This rank's world: all ranks of the job in the recipe's layout; or those of its role, when the teacher has ranks of its own.

    SIGTERM is noted from now on; before, while the ranks find each other, it ends the process as usual.
    """
    from minitron_mp import parallel
    from minitron_mp.leaving import listening

    t = recipe.teacher
    if not t.is_remote:
        with parallel.world(recipe.parallel, seed=recipe.seed) as w, listening(recipe.root) as leaving:
            yield replace(w, leaving=leaving)
        return
    job_size = parallel.job_size()
    others = {**t.siblings, "teacher": t.ranks_in(job_size)}
    layouts = {
        role: (others.get(role.removeprefix("sibling "), 0), own.parallel)
        for role, own in students_of(recipe).items()
    }
    layouts["student"] = (t.student_ranks or max(0, job_size - sum(others.values())), recipe.parallel)
    layouts["teacher"] = (others["teacher"], t.parallel)
    roots = {role: own.root for role, own in students_of(recipe).items()}
    with (
        parallel.roles(layouts, seed=recipe.seed, stream_timeout_s=t.timeout_s) as w,
        listening(roots.get(w.role, recipe.root)) as leaving,
    ):
        yield replace(w, leaving=leaving)
