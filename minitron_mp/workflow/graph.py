"""The stages in order: which artefact each needs, which settings change it, and whether it has to run again.

An artefact is the recipe's own when its manifest is the one that the recipe asks for; then its stage is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron_mp import __version__
from minitron_mp.artifacts.files import fingerprint_files
from minitron_mp.artifacts.manifest import Manifest, find_manifest, require_artifact
from minitron_mp.config.pruning import DepthConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.data.corpus import corpus_fingerprint
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.hf_config import read_arch
from minitron_mp.models.hf_weights import asset_files
from minitron_mp.pruning.candidates import candidate_name, training
from minitron_mp.pruning.search_space import layers_to_drop, search_candidates
from minitron_mp.pruning.target import resolve_target
from minitron_mp.workflow.preflight import recipe_problems
from minitron_mp.workflow.stage import Stage

BASE, TUTOR = "base", "tutor"
"""Among a stage's inputs: the stages that recipe.base and recipe.tutor name."""

HOW = {"micro_batch_size", "overlap", "recompute", "tp_comm_overlap", "cuda_graphs", "collect_interval"}

HOW |= {"log_interval", "checkpoint_interval", "keep_checkpoints", "async_save", "profile", "baseline"}
"""Settings of a training run that change nothing in its result."""


def _run_settings(recipe: Recipe) -> dict[str, Any]:
    return {
        "precision": recipe.precision,
        "seed": recipe.seed,
        "sequence_length": recipe.data.sequence_length,
    }


def _target(recipe: Recipe) -> dict[str, Any]:
    if recipe.search is not None:
        return {}  # what it found is among the inputs
    # What counts are the sizes. Searched ones depend on what tp has to divide, but seldom come out differently.
    if recipe.target.searched:
        student = resolve_target(
            read_arch(Path(recipe.model), weights=False),
            recipe.target,
            recipe.parallel.tp,
            recipe.export.family,
        )
        return student.sizes()
    return recipe.target.model_dump(exclude_defaults=True, exclude={"axes", "align"})


def _plan(recipe: Recipe) -> dict[str, Any]:
    depth = recipe.depth.model_dump(include={"method", "protect_first", "protect_last"})
    usual = DepthConfig().model_dump(include=set(depth))
    return {**_target(recipe), **(depth if depth != usual and _layers_to_drop(recipe) else {})}


def _depth(recipe: Recipe) -> dict[str, Any]:
    # The trials of single layers serve any number of them.
    count = {} if recipe.depth.method == "drop" else {"layers to drop": _layers_to_drop(recipe)}
    other = {"num_samples", "task"} if recipe.depth.metric == "task" else {"metric", "task", "task_items"}
    return {**recipe.depth.model_dump(exclude={"micro_batch_size", *other}), **_run_settings(recipe), **count}


def _depth_files(recipe: Recipe) -> dict[str, str]:
    return {"task": fingerprint_files([Path(recipe.depth.task)])} if recipe.depth.task else {}


def _layers_to_drop(recipe: Recipe) -> int:
    """By measured or chosen importance; 0 where the target names them."""
    if recipe.search is None and (
        recipe.target.drop_layers is not None
        or (recipe.target.num_layers is None and "layer" not in recipe.target.axes)
    ):
        return 0
    return layers_to_drop(recipe, read_arch(Path(recipe.model), weights=False))


def _drops_layers(recipe: Recipe) -> bool:
    """Whether layers go by their importance. Sizes that cannot be are told by check(), beside whatever else is wrong."""
    try:
        return _layers_to_drop(recipe) > 0
    except InputError:
        return True


def _search(recipe: Recipe) -> dict[str, Any]:
    """What its result depends on: the candidates themselves, and not what makes them, of which the layout is a part that seldom changes them."""
    assert recipe.search is not None
    found = search_candidates(recipe, read_arch(Path(recipe.model), weights=False))
    measured = recipe.search.model_dump(include={"num_samples", "finalists", "steps"})
    if recipe.search.latency_ms:  # of these candidates those that are as fast, on these ranks
        measured |= recipe.search.model_dump(include={"latency_ms", "tolerance", "batch_size", "context"}) | {
            "parallel": recipe.parallel.model_dump()
        }
    return {
        **measured,
        **_run_settings(recipe),
        "candidates": sorted(map(candidate_name, found)),
        "depth": recipe.depth.model_dump(include={"method", "protect_first", "protect_last"}),
        "distill": training(recipe).model_dump(exclude=HOW, exclude_none=True),
        "teacher precision": recipe.teacher.precision,
        **_teacher_fp8(recipe),
    }


def _distill(recipe: Recipe) -> dict[str, Any]:
    # Placement and layout of the teacher do not change what it says, to rounding; a top-k payload does.
    teacher = {
        "precision": recipe.teacher.precision,
        "top_k": recipe.teacher.top_k if recipe.teacher.payload == "topk" else None,
    }
    teacher |= _teacher_fp8(recipe)
    meanwhile = (
        {"correct": recipe.correct.model_dump(exclude=HOW, exclude_none=True)}
        if recipe.correct and recipe.corrects_meanwhile
        else {}
    )
    return {
        **recipe.distill.model_dump(exclude=HOW, exclude_none=True),
        **_run_settings(recipe),
        "teacher": teacher,
        **meanwhile,
    }


def _teacher_fp8(recipe: Recipe) -> dict[str, Any]:
    return {"fp8": recipe.teacher.fp8} if recipe.teacher.fp8 else {}


def _evaluate(recipe: Recipe) -> dict[str, Any]:
    items = {"task_items": recipe.evaluate.task_items} if recipe.evaluate.tasks else {}
    return {"num_samples": recipe.evaluate.num_samples, **items, **_run_settings(recipe)}


def _task_files(recipe: Recipe) -> dict[str, str]:
    return {f"task {name}": fingerprint_files([Path(path)]) for name, path in recipe.evaluate.tasks.items()}


def _cache(recipe: Recipe) -> dict[str, Any]:
    d, t = recipe.distill, recipe.teacher
    batches = d.model_dump(include={"steps", "global_batch_size", "micro_batch_size"})
    top = {"top_k": t.top_k, "temperature": d.temperature} if t.payload == "topk" else {}
    return {
        **batches,
        **_run_settings(recipe),
        "precision": recipe.teacher_precision,
        "payload": t.payload,
        **top,
        **_teacher_fp8(recipe),
    }


def _model_files(model: str) -> dict[str, str]:
    folder = Path(model)
    read_arch(folder)  # a folder that is no model gets its own error
    return {"model": fingerprint_files([*asset_files(folder), *folder.glob("*.safetensors")])}


def _text_files(recipe: Recipe, further: bool = False) -> dict[str, str]:
    tokenizer = Path(recipe.data.tokenizer) if recipe.data.tokenizer else None
    own = (
        {}
        if tokenizer is None
        else {"tokenizer": fingerprint_files([tokenizer] if tokenizer.is_file() else asset_files(tokenizer))}
    )
    return {"text": corpus_fingerprint(recipe.data, further), **own}


STAGES: dict[str, Stage] = {
    "import": Stage("teacher", (), lambda recipe: {}, lambda recipe: _model_files(recipe.model)),
    "data": Stage(
        "data",
        ("import",),
        lambda recipe: {**recipe.data.model_dump(include={"valid_fraction"}), "seed": recipe.seed},
        _text_files,
    ),
    "score": Stage(
        "importance.safetensors",
        (BASE, "data"),
        lambda recipe: {**recipe.score.model_dump(exclude={"micro_batch_size"}), **_run_settings(recipe)},
    ),
    "plan": Stage("plan.json", ("score",), _plan),
    "prune": Stage("student", (BASE, "plan"), lambda recipe: {}),
    "distill": Stage("student_distilled", (TUTOR, "data", "prune"), _distill),
    "evaluate": Stage("evaluation.json", (BASE, TUTOR, "data", "prune", "distill"), _evaluate, _task_files),
    "export": Stage(
        "student_hf",
        ("import", "distill"),
        lambda recipe: {**recipe.export.model_dump(), "precision": recipe.precision},
    ),
}

OPTIONAL: dict[str, Stage] = {
    "correct": Stage(
        "teacher_corrected",
        ("import", "data"),
        lambda r: (
            {**r.correct.model_dump(exclude={*HOW, "when"}, exclude_none=True), **_run_settings(r)}
            if r.correct
            else {}
        ),
    ),
    "depth": Stage("depth.json", (BASE, "data"), _depth, _depth_files),
    "texts": Stage(
        "held_out", ("import",), lambda recipe: {}, lambda recipe: _text_files(recipe, further=True)
    ),
    "search": Stage("search.json", (BASE, TUTOR, "data", "score"), _search),
    "import-teacher": Stage(
        "distilling_teacher", (), lambda recipe: {}, lambda recipe: _model_files(recipe.teacher.model or "")
    ),
    "cache": Stage("teacher_signals", (TUTOR, "data"), _cache),
}
"""import-teacher: for teacher.model. correct: after data, where the recipe has that section. depth: before plan, where layers go and
depth.method is not cosine. search: before plan, where the recipe has that section. texts: after data, for
data.held_out. cache: before distill, for teacher.placement: cached."""

COMES_WITH = {
    "cache": "teacher.placement: cached",
    "import-teacher": "teacher.model",
    "correct": "a section correct whose `when` is before, for example correct: {steps: 1000}",
    "depth": "depth.method: drop, block or greedy, and a target of fewer layers",
    "texts": "data.held_out",
    "search": "a section search, for example search: {parameters: 8B}",
}
"""What brings an optional stage into a recipe."""


class StageGraph:
    """A recipe and its artefacts. Reads files; needs neither a GPU nor torchrun."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        names = list(STAGES)
        if recipe.teacher.model:
            names.insert(names.index("import") + 1, "import-teacher")
        if recipe.base == "correct":
            names.insert(names.index("score"), "correct")
        if recipe.depth.method != "cosine" and _drops_layers(recipe):
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

    def require_stage(self, name: str) -> None:
        """InputError unless the recipe has the stage."""
        if name not in self.stages:
            raise InputError(f"the recipe has no stage {name}; it comes with {COMES_WITH[name]}")

    def manifest(self, name: str) -> Manifest:
        """What the stage's artefact must say to be this recipe's."""
        if name not in self._manifests:
            stage = self.stages[name]
            inputs = {other: self.manifest(other).fingerprint for other in self.inputs(name)} | stage.sources(
                self.recipe
            )
            self._manifests[name] = Manifest(
                stage=name,
                settings=stage.settings(self.recipe),
                inputs=inputs,
                made_by=f"minitron_mp {__version__}",
            )
        return self._manifests[name]

    def without_correction(self) -> StageGraph:
        """The same recipe without its section correct, in the folder that correct.baseline names."""
        folder = self.recipe.correct and self.recipe.correct.baseline
        assert folder
        other = StageGraph(self.recipe.model_copy(update={"correct": None, "output": folder}))
        other._manifests = {
            name: self.manifest(name) for name in ("import", "data", "texts") if name in self.stages
        }  # files are hashed once
        return other

    def inputs(self, name: str) -> list[str]:
        """Stages whose artefacts a stage reads."""
        optional = {"plan": ("depth", "search"), "search": ("depth",), "evaluate": ("texts",)}.get(name, ())
        found = (*self.stages[name].inputs, *(other for other in optional if other in self.stages))
        meant = {BASE: self.recipe.base, TUTOR: self.recipe.tutor}
        return list(dict.fromkeys(meant.get(other, other) for other in found))

    def why_not_done(self, name: str) -> list[str] | None:
        """None when the artefact is whole and this recipe's; otherwise what differs ([] when it is not there)."""
        found = find_manifest(self.paths[name])
        return [] if found is None else (found.differences(self.manifest(name)) or None)

    def require_inputs(self, name: str) -> None:
        """InputError unless every artefact that the stage reads, and what those were made from, is this recipe's."""
        for other in self.before(name) + (["cache"] if name == "distill" and "cache" in self.stages else []):
            require_artifact(self.paths[other], other, self.manifest(other))

    def before(self, name: str) -> list[str]:
        """All stages that a stage builds on, in order."""
        needed = set(self.inputs(name))
        for other in reversed(self.stages):
            needed |= set(self.inputs(other)) if other in needed else set()
        return [other for other in self.stages if other in needed]

    def check(self, num_ranks: int | None = None, *, weights: bool = True) -> None:
        """InputError with everything about the recipe that would stop a later stage; num_ranks: of the job, where it is known. weights: look at them."""
        refuse(
            "this recipe cannot run:", recipe_problems(self.recipe, self.paths, num_ranks, weights=weights)
        )

    def check_text(self) -> None:
        """InputError when the tokens of the data stage are too few for a later one; evaluate comes after hours of distill."""
        from minitron_mp.data.batches import too_short_problems

        recipe = self.recipe
        readers = [
            recipe.score,
            *[recipe.depth] * ("depth" in self.stages and recipe.depth.metric == "loss"),
            *([recipe.search] if recipe.search else []),
        ]
        calibration = max(section.num_samples for section in readers)
        wanted = {"calibration": calibration, "train": 0, "valid": recipe.evaluate.num_samples}
        folders = [("data", part, count) for part, count in wanted.items()] + [
            ("texts", name, recipe.evaluate.num_samples) for name in recipe.data.held_out
        ]
        found = (
            too_short_problems(self.paths[folder], part, recipe.data.sequence_length, count)
            for folder, part, count in folders
        )
        refuse("there is too little text:", [problem for problems in found for problem in problems])
