"""Run stages on the ranks of a job: one stage, or all unfinished stages.

A single stage raises InputError when an input is missing or out of date. The error names the field
that differs.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from minitron_mp.artifacts.output_lock import LOCK
from minitron_mp.artifacts.run_log import JobInfo, append_record
from minitron_mp.config.recipe import Recipe
from minitron_mp.console import say, speaks
from minitron_mp.distributed.job import require_launcher, sigterm_exits
from minitron_mp.errors import refuse
from minitron_mp.workflow.changes import NEWEST, ResumeOptions, prepare_resume
from minitron_mp.workflow.finish import discard_leftovers, finish_run, remove_finished
from minitron_mp.workflow.graph import StageGraph
from minitron_mp.workflow.join import co_student_recipes, join_any_ranks, join_ranks
from minitron_mp.workflow.output_folder import locked_output, write_resolved_recipe
from minitron_mp.workflow.saved_steps import at_saved_step, saved_step_number
from minitron_mp.workflow.stage import Stage
from minitron_mp.workflow.stage_files import StopRequested

if TYPE_CHECKING:
    from minitron_mp.distributed.preemption import Preemption
    from minitron_mp.distributed.world import World

T = TypeVar("T")


def run_stage(
    name: str, recipe: Recipe, *, force: bool = False, step: str = "", resume: ResumeOptions = NEWEST
) -> Path:
    """Run one stage on all ranks of the job and return the path of its artifact.

    Called on all ranks. A finished stage is skipped unless force is given. step: for evaluate and
    export, a saved step of distill, or "best"; see saved_steps.py. The run may go on meanwhile, so
    nothing but the artifact is written. resume: for a training stage.
    """
    require_launcher()
    graph = StageGraph(recipe, resume.accept)
    graph.require_stage(name)
    graph, _ = graph.place(name)
    recipe = graph.recipe
    graph.check_output(report=False)
    stage = graph.stages[name]
    if not stage.needs_ranks:
        if speaks():  # one process does the work, also under torchrun
            with sigterm_exits(), locked_output(recipe.run.root):
                _run_in_this_process(stage, graph, force=force)
        return graph.paths[name]
    join = join_any_ranks if stage.any_ranks else join_ranks
    with join(recipe) as world, _preemptible(world, [stage]):
        if world.role == "student" and step:
            # Rank 0 chooses the step, because the run may save and delete others meanwhile.
            number = _on_rank_0(partial(saved_step_number, graph, step))
            graph = at_saved_step(graph, str(number))
            with _locked(recipe, world, lock=f".{graph.paths[name].name}.lock"):
                _run(stage, graph, world, force=force)
        elif world.role == "student":
            with _locked(recipe, world):
                _on_rank_0(lambda: _say_deleted_sources(graph))
                _on_rank_0(partial(prepare_resume, graph, name, resume, force=force))
                _run(stage, graph, world, force=force)
        elif stage.meets_roles:
            _take_part(stage, graph, world, force=force, resume=resume)
    return graph.paths[name]


def compress(recipe: Recipe, accept: Sequence[str] = ()) -> Path:
    """Run all unfinished stages of all rounds, then write the report. Called on all ranks.

    Returns the path of the exported student. The report is report.md and report.html. accept:
    settings that may differ from those of a checkpoint.
    """
    require_launcher()
    # Rank 0 checks saved progress, because that reads the model and the text.
    StageGraph(recipe, accept).check(saved_progress=False)
    for graph in StageGraph(recipe, accept).rounds():
        if not _run_round(graph):
            break
    return graph.paths["export"]


def _run_round(graph: StageGraph) -> bool:
    """Run all unfinished stages of a round on all ranks, in its layout. Return False after an early stop."""
    recipe = graph.recipe
    is_finished = False
    with join_ranks(recipe) as world:
        with _preemptible(world, graph.stages.values()):
            if world.role == "student":
                with _locked(recipe, world):
                    _run_all(graph, world)
            else:
                for stage in graph.stages.values():
                    if stage.meets_roles:
                        _take_part(stage, graph, world)
            is_finished = True
        if world.channel is not None and not graph.is_last_round:
            # The ranks of the teacher do not notice a stop of the student that comes after distill.
            is_finished = all(world.channel.exchange("round", is_finished, timeout_s=None).values())
    return is_finished


def _run_all(graph: StageGraph, world: World) -> None:
    """Run all unfinished stages of a round, and after the last round write the report.

    Called on all ranks of the student.
    """
    recipe = graph.recipe
    if not graph.earlier:
        _on_rank_0(lambda: graph.check(world.job_size))
        _on_rank_0(lambda: write_resolved_recipe(recipe))
        _on_rank_0(lambda: _say_deleted_sources(graph))
        _on_rank_0(lambda: remove_finished(graph))
        say(
            f"{recipe.root}: the run can be stopped at any time; the same command resumes from the last "
            "finished stage and checkpoint"
        )
    else:
        say(f"round {recipe.round_name}: {recipe.root}")
    _run_unfinished(graph, world)
    _on_rank_0(lambda: discard_leftovers(graph))
    if graph.is_last_round:
        _on_rank_0(lambda: finish_run(graph))


def _run_unfinished(graph: StageGraph, world: World) -> None:
    """Run all unfinished stages on all ranks.

    Problems of finished artifacts are collected over consecutive stages that check them, and raised
    before the next stage that does not.
    """
    problems: list[str] = []
    to_run = graph.stages_of_compress()
    for name, stage in graph.stages.items():
        if stage.problems is None and problems:
            _on_rank_0(partial(refuse, "a later stage would fail with these artifacts:", problems))
        if name in to_run:
            _run(stage, graph, world, force=False)
        if stage.problems is not None:
            problems += _on_rank_0(partial(_artifact_problems, graph, name))


def _artifact_problems(graph: StageGraph, name: str) -> list[str]:
    """Return why an artifact would stop a later stage of this round, or of a round that shares it."""
    problems = graph.artifact_problems(name)
    for each in graph.rounds():
        if each is not graph and name in each.stages and each.place(name)[0] is graph:
            found = [problem for problem in each.artifact_problems(name) if problem not in problems]
            problems += [f"round {each.recipe.round_name}: {problem}" for problem in found]
    return problems


def _run(stage: Stage, graph: StageGraph, world: World, *, force: bool) -> None:
    """Run one stage on all ranks. Rank 0 reads the files and decides whether the stage must run."""
    from minitron_mp.workflow.context import StageContext

    name, recipe = stage.name, graph.recipe
    differences = _on_rank_0(lambda: _why_run(name, graph, force))
    if differences is not None and graph.saved_step is None:
        _preemption(world).raise_if_requested(f"before {name}", world.is_main)
    students: dict[str, Recipe] = {}
    if stage.meets_roles and world.channel is not None:
        students = _active_students(stage, recipe, world, differences is not None)
    if differences is None:
        say(f"{name}: done, {graph.paths[name]}")
        return
    _announce(name, differences)
    if graph.saved_step is None:
        _on_rank_0(lambda: write_resolved_recipe(recipe))
    start = time.monotonic()
    if stage.run is not None:
        manifest = _on_rank_0(lambda: graph.manifest(name))
        context = StageContext(recipe, graph.paths, manifest, world=world, students=students)
        stage.run(replace(context, accept=graph.accept))
    elif stage.run_on_one_rank is not None:
        _run_on_rank_0(stage, graph, world)
    seconds = time.monotonic() - start
    if graph.saved_step is None:
        _on_rank_0(lambda: _record(stage, graph, seconds, world))
    say(f"{name}: {graph.paths[name]} in {seconds:.1f} s")


def _run_on_rank_0(stage: Stage, graph: StageGraph, world: World) -> None:
    """Run a stage that needs no ranks on rank 0, while the others wait. Called on all ranks."""
    from minitron_mp.distributed.preemption import Preempted

    preemption = _preemption(world)
    work = stage.run_on_one_rank
    assert work is not None

    def run() -> str:
        files = replace(graph.files(stage.name), stop_request=partial(preemption.stop_request, True))
        try:
            work(files)
        except StopRequested as stop:
            return str(stop)
        return ""

    reason = _on_rank_0(run)
    if reason:
        raise Preempted(f"stopped in {stage.name} ({reason})")


def _run_in_this_process(stage: Stage, graph: StageGraph, *, force: bool) -> None:
    """Run a stage that needs no ranks, without process groups."""
    name = stage.name
    differences = _why_run(name, graph, force)
    if differences is None:
        say(f"{name}: done, {graph.paths[name]}")
        return
    _announce(name, differences)
    write_resolved_recipe(graph.recipe)
    start = time.monotonic()
    assert stage.run_on_one_rank is not None
    stage.run_on_one_rank(graph.files(name))
    seconds = time.monotonic() - start
    _record(stage, graph, seconds)
    say(f"{name}: {graph.paths[name]} in {seconds:.1f} s")


def _why_run(name: str, graph: StageGraph, force: bool) -> list[str] | None:
    """Return None if the stage is done, else the differences of its artifact.

    InputError when an input is missing or out of date.
    """
    differences = graph.why_not_done(name)
    if differences is None and not force:
        return None
    graph.require_inputs(name)
    graph.check_before_stage(name, force=force)
    return differences or []


def _say_deleted_sources(graph: StageGraph) -> None:
    for line in graph.deleted_source_lines():
        say(line)


def _announce(name: str, differences: list[str]) -> None:
    for row in differences:
        say(f"{name}: rerun because of {row}")


def _record(stage: Stage, graph: StageGraph, seconds: float, world: World | None = None) -> None:
    """Append a record of the artifact to the run log, which the report reads."""
    job = JobInfo()
    if world is not None and stage.needs_ranks:
        from minitron_mp.distributed.launcher import ranks_per_node
        from minitron_mp.evaluation.prefill_speed import device_name

        layout = graph.recipe.parallel.model_dump(exclude_defaults=True)
        job = JobInfo(world.job_size, ranks_per_node(), layout, device_name(world))
    append_record(graph.recipe.run.root, stage.name, graph.manifest(stage.name).fingerprint, seconds, job)


def _on_rank_0(action: Callable[[], T]) -> T:
    """Run an action on rank 0 and return its result on every rank. Called on all ranks."""
    from minitron_mp.distributed.sync import on_rank_0

    return on_rank_0(action, takes_long=True)  # fingerprints of large models, figures


@contextmanager
def _locked(recipe: Recipe, world: World, lock: str = LOCK) -> Iterator[None]:
    """Hold a lock of the output folder on rank 0, in this context. Called on all ranks."""
    with ExitStack() as stack:
        _on_rank_0(lambda: stack.enter_context(locked_output(recipe.run.root, lock)))
        yield


@contextmanager
def _preemptible(world: World, stages: Iterable[Stage]) -> Iterator[None]:
    """On an early stop, print one line, delete the stop file, and inform the other roles.

    stages: the stages that the command runs.
    """
    from minitron_mp.distributed.preemption import Preempted

    try:
        yield
    except Preempted as stop:
        preemption = _preemption(world)
        if world.channel is not None and not preemption.roles_met:
            for stage in stages:
                if stage.meets_roles:
                    world.channel.exchange(stage.name, False, timeout_s=None)
        say(f"{stop}; the same command resumes from there")
        if world.is_main and preemption.stop_file.exists():
            preemption.stop_file.unlink(missing_ok=True)
            say(f"{preemption.stop_file} was deleted, so that the next run does not stop")
        if _preemption(world).interrupted:
            raise SystemExit(128 + signal.SIGINT) from None  # a script does not start its next command


def _preemption(world: World) -> Preemption:
    """Return the stop requests of a world that join_ranks() made."""
    assert world.preemption is not None
    return world.preemption


def _take_part(
    stage: Stage, graph: StageGraph, world: World, *, force: bool = False, resume: ResumeOptions = NEWEST
) -> None:
    """Wait until the student reaches the stage, and take part in it. For ranks of another role.

    graph: the student's.
    """
    from minitron_mp.workflow.context import StageContext

    assert stage.run is not None
    recipe = graph.recipe
    if world.role != "teacher":
        sibling = StageGraph(co_student_recipes(recipe)[world.role], graph.accept)
        with _locked(sibling.recipe, world):
            if force or _on_rank_0(lambda: sibling.why_not_done(stage.name)) is not None:
                _on_rank_0(partial(prepare_resume, sibling, stage.name, resume, force=force))
            _run(stage, sibling, world, force=force)
        return
    students = _active_students(stage, recipe, world, True)
    if students:
        manifest = _on_rank_0(lambda: graph.manifest(stage.name))
        stage.run(StageContext(recipe, graph.paths, manifest, world=world, students=students))


def _active_students(stage: Stage, recipe: Recipe, world: World, active: bool) -> dict[str, Recipe]:
    """Return the students whose stage is not done.

    Called on every rank of the job. Some ranks may arrive hours later, so there is no timeout.
    """
    assert world.channel is not None
    is_active = world.channel.exchange(stage.name, active, timeout_s=None)
    _preemption(world).roles_met = True
    return {role: student for role, student in co_student_recipes(recipe).items() if is_active[role]}
