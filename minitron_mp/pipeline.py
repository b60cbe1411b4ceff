"""The stages in order: which artefact each needs, which settings change it, and whether it has to run again.

An artefact is the recipe's own when its manifest is the one that the recipe asks for; then its stage is done. compress() runs what
is not done. A single stage refuses inputs that are missing or made from something else, naming the field.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minitron_mp import __version__, artifact, candidates, hf, text
from minitron_mp.artifact import Manifest
from minitron_mp.config import Recipe, load_recipe, save_recipe
from minitron_mp.console import say, speaks, table
from minitron_mp.errors import InputError, refuse
from minitron_mp.plan import Importance, PrunePlan, Trials, exportable, make_plan, resolve_target
from minitron_mp.precheck import recipe_problems
from minitron_mp.pruning_config import Depth

FINISHED = "finished"
"""Beside the artefacts when `compress` has reached its end; for scripts that start it again until then."""
BASE, TUTOR = "base", "tutor"
"""Among a stage's inputs: the stages that recipe.base and recipe.tutor name."""


@dataclass(frozen=True)
class Stage:
    """artifact: name below recipe.output. inputs: stages that come before. settings: what of the recipe changes the result."""

    artifact: str
    inputs: tuple[str, ...]
    settings: Callable[[Recipe], dict[str, Any]]
    sources: Callable[[Recipe], dict[str, str]] = lambda recipe: {}
    """Fingerprints of files of the user that the stage reads."""


HOW = {"micro_batch_size", "overlap", "recompute", "tp_comm_overlap", "collect_interval"}
HOW |= {"log_interval", "checkpoint_interval", "keep_checkpoints", "async_save", "profile"}
"""Settings of a training run that change nothing in its result."""


def _run_settings(recipe: Recipe) -> dict[str, Any]:
    return {"precision": recipe.precision, "seed": recipe.seed, "sequence_length": recipe.data.sequence_length}


def _target(recipe: Recipe) -> dict[str, Any]:
    if recipe.search is not None:
        return {}  # what it found is among the inputs
    # What counts are the sizes. Searched ones depend on what tp has to divide, but seldom come out differently.
    if recipe.target.searched:
        student = resolve_target(hf.read_arch(Path(recipe.model), weights=False), recipe.target, recipe.parallel.tp, recipe.export.family)
        return student.model_dump(include={"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"})
    return recipe.target.model_dump(exclude_defaults=True, exclude={"axes", "align"})


def _plan(recipe: Recipe) -> dict[str, Any]:
    depth = recipe.depth.model_dump(include={"method", "protect_first", "protect_last"})
    usual = Depth().model_dump(include=set(depth))
    return {**_target(recipe), **(depth if depth != usual and _layers_to_drop(recipe) else {})}


def _depth(recipe: Recipe) -> dict[str, Any]:
    # The trials of single layers serve any number of them.
    count = {} if recipe.depth.method == "drop" else {"layers to drop": _layers_to_drop(recipe)}
    other = {"num_samples", "task"} if recipe.depth.metric == "task" else {"metric", "task", "task_items"}
    return {**recipe.depth.model_dump(exclude={"micro_batch_size", *other}), **_run_settings(recipe), **count}


def _depth_files(recipe: Recipe) -> dict[str, str]:
    return {"task": artifact.fingerprint_files([Path(recipe.depth.task)])} if recipe.depth.task else {}


def _layers_to_drop(recipe: Recipe) -> int:
    """By measured or chosen importance; 0 where the target names them."""
    if recipe.search is None and (recipe.target.drop_layers is not None or (recipe.target.num_layers is None and "layer" not in recipe.target.axes)):
        return 0
    return candidates.layers_to_drop(recipe, hf.read_arch(Path(recipe.model), weights=False))


def _search(recipe: Recipe) -> dict[str, Any]:
    """What its result depends on: the candidates themselves, and not what makes them, of which the layout is a part that seldom changes them."""
    assert recipe.search is not None
    found = candidates.candidates(recipe, hf.read_arch(Path(recipe.model), weights=False))
    measured = recipe.search.model_dump(include={"num_samples", "finalists", "steps"})
    if recipe.search.latency_ms:  # of these candidates those that are as fast, on these ranks
        measured |= recipe.search.model_dump(include={"latency_ms", "tolerance", "batch_size", "context"}) | {"parallel": recipe.parallel.model_dump()}
    return {
        **measured,
        **_run_settings(recipe),
        "candidates": sorted(map(candidates.name_of, found)),
        "depth": recipe.depth.model_dump(include={"method", "protect_first", "protect_last"}),
        "distill": candidates.training(recipe).model_dump(exclude=HOW, exclude_none=True),
        "teacher precision": recipe.teacher.precision,
        **_teacher_fp8(recipe),
    }


def _distill(recipe: Recipe) -> dict[str, Any]:
    # Placement and layout of the teacher do not change what it says, to rounding; a top-k payload does.
    teacher = {"precision": recipe.teacher.precision, "top_k": recipe.teacher.top_k if recipe.teacher.payload == "topk" else None}
    teacher |= _teacher_fp8(recipe)
    meanwhile = {"correct": recipe.correct.model_dump(exclude=HOW, exclude_none=True)} if recipe.correct and recipe.corrects_meanwhile else {}
    return {**recipe.distill.model_dump(exclude=HOW, exclude_none=True), **_run_settings(recipe), "teacher": teacher, **meanwhile}


def _teacher_fp8(recipe: Recipe) -> dict[str, Any]:
    return {"fp8": recipe.teacher.fp8} if recipe.teacher.fp8 else {}


def _evaluate(recipe: Recipe) -> dict[str, Any]:
    items = {"task_items": recipe.evaluate.task_items} if recipe.evaluate.tasks else {}
    return {"num_samples": recipe.evaluate.num_samples, **items, **_run_settings(recipe)}


def _task_files(recipe: Recipe) -> dict[str, str]:
    return {f"task {name}": artifact.fingerprint_files([Path(path)]) for name, path in recipe.evaluate.tasks.items()}


def _cache(recipe: Recipe) -> dict[str, Any]:
    d, t = recipe.distill, recipe.teacher
    batches = d.model_dump(include={"steps", "global_batch_size", "micro_batch_size"})
    top = {"top_k": t.top_k, "temperature": d.temperature} if t.payload == "topk" else {}
    return {**batches, **_run_settings(recipe), "precision": recipe.teacher_precision, "payload": t.payload, **top, **_teacher_fp8(recipe)}


def _model_files(model: str) -> dict[str, str]:
    folder = Path(model)
    hf.read_arch(folder)  # a folder that is no model gets its own error
    return {"model": artifact.fingerprint_files([*hf.assets(folder), *folder.glob("*.safetensors")])}


def _text_files(recipe: Recipe, further: bool = False) -> dict[str, str]:
    tokenizer = Path(recipe.data.tokenizer) if recipe.data.tokenizer else None
    own = {} if tokenizer is None else {"tokenizer": artifact.fingerprint_files([tokenizer] if tokenizer.is_file() else hf.assets(tokenizer))}
    return {"text": text.fingerprint(recipe.data, further), **own}


STAGES: dict[str, Stage] = {
    "import": Stage("teacher", (), lambda recipe: {}, lambda recipe: _model_files(recipe.model)),
    "data": Stage("data", ("import",), lambda recipe: {**recipe.data.model_dump(include={"valid_fraction"}), "seed": recipe.seed}, _text_files),
    "score": Stage("importance.safetensors", (BASE, "data"), lambda recipe: {**recipe.score.model_dump(exclude={"micro_batch_size"}), **_run_settings(recipe)}),
    "plan": Stage("plan.json", ("score",), _plan),
    "prune": Stage("student", (BASE, "plan"), lambda recipe: {}),
    "distill": Stage("student_distilled", (TUTOR, "data", "prune"), _distill),
    "evaluate": Stage("evaluation.json", (BASE, TUTOR, "data", "prune", "distill"), _evaluate, _task_files),
    "export": Stage("student_hf", ("import", "distill"), lambda recipe: {**recipe.export.model_dump(), "precision": recipe.precision}),
}

OPTIONAL: dict[str, Stage] = {
    "correct": Stage(
        "teacher_corrected",
        ("import", "data"),
        lambda r: {**r.correct.model_dump(exclude={*HOW, "when"}, exclude_none=True), **_run_settings(r)} if r.correct else {},
    ),
    "depth": Stage("depth.json", (BASE, "data"), _depth, _depth_files),
    "texts": Stage("held_out", ("import",), lambda recipe: {}, lambda recipe: _text_files(recipe, further=True)),
    "search": Stage("search.json", (BASE, TUTOR, "data", "score"), _search),
    "import-teacher": Stage("distilling_teacher", (), lambda recipe: {}, lambda recipe: _model_files(recipe.teacher.model or "")),
    "cache": Stage("teacher_signals", (TUTOR, "data"), _cache),
}
"""import-teacher: for teacher.model. correct: after data, where the recipe has that section. depth: before plan, where layers go and
depth.method is not cosine. search: before plan, where the recipe has that section. texts: after data, for
data.held_out. cache: before distill, for teacher.placement: cached."""


class Project:
    """A recipe and its artefacts. Reads files; needs neither a GPU nor torchrun."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        names = list(STAGES)
        if recipe.teacher.model:
            names.insert(names.index("import") + 1, "import-teacher")
        if recipe.base == "correct":
            names.insert(names.index("score"), "correct")
        if recipe.depth.method != "cosine" and _layers_to_drop(recipe):
            names.insert(names.index("plan"), "depth")
        if recipe.search:
            names.insert(names.index("plan"), "search")
        if recipe.data.held_out:
            names.insert(names.index("data") + 1, "texts")
        if recipe.teacher.placement == "cached":
            names.insert(names.index("distill"), "cache")
        self.stages = {name: {**STAGES, **OPTIONAL}[name] for name in names}
        self.paths = {name: recipe.root / stage.artifact for name, stage in self.stages.items()}
        self._manifests: dict[str, Manifest] = {}

    def manifest(self, name: str) -> Manifest:
        """What the stage's artefact must say to be this recipe's."""
        if name not in self._manifests:
            stage = self.stages[name]
            inputs = {other: self.manifest(other).fingerprint for other in self.inputs(name)} | stage.sources(self.recipe)
            self._manifests[name] = Manifest(stage=name, settings=stage.settings(self.recipe), inputs=inputs, made_by=f"minitron_mp {__version__}")
        return self._manifests[name]

    def inputs(self, name: str) -> list[str]:
        """Stages whose artefacts a stage reads."""
        optional = {"plan": ("depth", "search"), "search": ("depth",), "evaluate": ("texts",)}.get(name, ())
        found = (*self.stages[name].inputs, *(other for other in optional if other in self.stages))
        meant = {BASE: self.recipe.base, TUTOR: self.recipe.tutor}
        return list(dict.fromkeys(meant.get(other, other) for other in found))

    def why_not_done(self, name: str) -> list[str] | None:
        """None when the artefact is whole and this recipe's; otherwise what differs ([] when it is not there)."""
        found = artifact.find(self.paths[name])
        return [] if found is None else (found.differences(self.manifest(name)) or None)

    def require_inputs(self, name: str) -> None:
        """InputError unless every artefact that the stage reads, and what those were made from, is this recipe's."""
        for other in self.before(name) + (["cache"] if name == "distill" and "cache" in self.stages else []):
            artifact.require(self.paths[other], other, self.manifest(other))

    def before(self, name: str) -> list[str]:
        """All stages that a stage builds on, in order."""
        needed = set(self.inputs(name))
        for other in reversed(self.stages):
            needed |= set(self.inputs(other)) if other in needed else set()
        return [other for other in self.stages if other in needed]

    def check(self, num_ranks: int | None = None, *, weights: bool = True) -> None:
        """InputError with everything about the recipe that would stop a later stage; num_ranks: of the job, where it is known. weights: look at them."""
        refuse("this recipe cannot run:", recipe_problems(self.recipe, self.paths, num_ranks, weights=weights))

    def check_text(self) -> None:
        """InputError when the tokens of the data stage are too few for a later one; evaluate comes after hours of distill."""
        from minitron_mp.data import too_short

        recipe = self.recipe
        readers = [recipe.score, *[recipe.depth] * ("depth" in self.stages and recipe.depth.metric == "loss"), *([recipe.search] if recipe.search else [])]
        calibration = max(section.num_samples for section in readers)
        wanted = {"calibration": calibration, "train": 0, "valid": recipe.evaluate.num_samples}
        folders = [("data", part, count) for part, count in wanted.items()] + [("texts", name, recipe.evaluate.num_samples) for name in recipe.data.held_out]
        found = (too_short(self.paths[folder], part, recipe.data.sequence_length, count) for folder, part, count in folders)
        refuse("there is too little text:", [problem for problems in found for problem in problems])


def run_stage(name: str, recipe: Recipe, *, force: bool = False) -> Path:
    """Run one stage (a key of STAGES or OPTIONAL) on all ranks of the job; the path of its artefact.

    Done already: nothing happens, unless force. Under torchrun every rank calls it.
    """
    project = Project(recipe)
    if name not in project.stages:
        missing = {
            "cache": "teacher.placement: cached",
            "import-teacher": "teacher.model",
            "correct": "a section correct whose `when` is before, for example correct: {steps: 1000}",
            "depth": "depth.method: drop, block or greedy, and a target of fewer layers",
            "texts": "data.held_out",
            "search": "a section search, for example search: {parameters: 8B}",
        }
        raise InputError(f"the recipe has no stage {name}; it comes with {missing[name]}")
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
        say(f"{recipe.root}: stop it when you like, the same command goes on from the last finished stage and checkpoint")
        for name in project.stages:
            _run(name, project, world, force=False)
            if name == ("texts" if "texts" in project.stages else "data"):
                _agree(world, project.check_text)
        for name in ("correct", "distill"):  # left when a kill came just after the model was written
            if name in project.stages:
                _agree(world, lambda name=name: artifact.discard_checkpoints(recipe.root / "checkpoints" / name, project.manifest(name)))
        _agree(world, lambda: _report(project))
        _agree(world, lambda: artifact.write_text(recipe.root / FINISHED, time.strftime("%Y-%m-%d %H:%M:%S\n")))
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
    from minitron_mp.report import write_report  # brings the drawing library, which one rank needs, at the end

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
    result = make_plan(Importance.load(project.paths["score"]), teacher, target, recipe.parallel.tp, recipe.export.family, recipe.depth, trials)
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
    active = _active(project.recipe, world, differences is not None) if name == "distill" and world.bridge is not None else {}
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
    say(f"{name}: {project.paths[name]} in {time.monotonic() - start:.1f} s")


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

    return on_main(decide)


def students_of(recipe: Recipe) -> dict[str, Recipe]:
    """Role -> recipe of all students of a remote teacher; siblings take its settings from the first one."""
    siblings = {f"sibling {path}": load_recipe(path).model_copy(update={"teacher": recipe.teacher}) for path in recipe.teacher.siblings}
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
    layouts = {role: (others.get(role.removeprefix("sibling "), 0), own.parallel) for role, own in students_of(recipe).items()}
    layouts["student"] = (t.student_ranks or max(0, job_size - sum(others.values())), recipe.parallel)
    layouts["teacher"] = (others["teacher"], t.parallel)
    roots = {role: own.root for role, own in students_of(recipe).items()}
    with parallel.roles(layouts, seed=recipe.seed, stream_timeout_s=t.timeout_s) as w, listening(roots.get(w.role, recipe.root)) as leaving:
        yield replace(w, leaving=leaving)
