"""Checks before a run: every problem of a recipe that would stop a later stage.

file_checks.py checks the user's files. Only the headers of weight files are read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from minitron_mp.artifacts.manifest import require_artifact
from minitron_mp.config.log import TRACKERS
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.rules import run_rule_problems
from minitron_mp.console import launched
from minitron_mp.errors import InputError, must_divide
from minitron_mp.models.arch import Arch, fp8_problems, layout_problems
from minitron_mp.workflow.file_checks import check_same_tokens, file_problems, problems_of, read_model
from minitron_mp.workflow.host_memory import host_memory_problems
from minitron_mp.workflow.settings import base_arch


def recipe_problems(
    recipe: Recipe,
    paths: Mapping[str, Path],
    num_ranks: int | None = None,
    *,
    weights: bool = True,
    deleted: Collection[str] = (),
) -> list[str]:
    """Return one sentence for each problem.

    paths: stage -> artifact. num_ranks: ranks of the job; None assumes one copy of the model.
    weights: False checks only the config.json of the models. deleted: finished stages whose files
    were deleted since; these files are not checked.
    """
    archs: dict[str, Arch] = {}
    teacher = recipe.teacher.model or recipe.model
    problems = []
    for folder in dict.fromkeys([recipe.model, teacher]):
        stage = "import" if folder == recipe.model else "import-teacher"
        if stage in deleted:
            archs[folder] = artifact_arch(paths, stage)
        else:
            problems += problems_of(partial(read_model, folder, archs, weights))
    problems += problems_of(partial(check_same_tokens, recipe.model, teacher))
    if weights:
        problems += file_problems(recipe, paths, archs.get(recipe.model), deleted)
    problems += run_rule_problems(recipe) + tracker_problems(recipe)
    problems += _rank_problems(recipe, num_ranks)
    problems += _batch_problems(recipe, num_ranks)
    if recipe.model in archs and teacher in archs:
        base: Arch | None = archs[recipe.model]
        if recipe.previous is not None:
            base = _student_before(recipe)
        if base is not None:
            problems += _model_problems(recipe, base, archs[teacher])
    if teacher in archs and num_ranks is not None and launched():  # a dry run is often on another node
        problems += host_memory_problems(recipe, archs[teacher], _student_ranks(recipe, num_ranks))
    return problems


def tracker_problems(recipe: Recipe) -> list[str]:
    """Return one sentence for each experiment tracker whose package is not installed."""
    return [
        f"log.{key} needs the package {TRACKERS[key]}, which is not installed; run `pip install "
        f"minitron-mp[{key}]`, or drop log.{key}"
        for key in recipe.log.trackers
        if find_spec(TRACKERS[key]) is None
    ]


def _student_before(recipe: Recipe) -> Arch | None:
    """Return the student of the round before; None if that round cannot run, which it reports."""
    try:
        return base_arch(recipe)
    except InputError:
        return None


def artifact_arch(paths: Mapping[str, Path], stage: str) -> Arch:
    """Return the architecture of an imported model, whose folder may have been deleted.

    paths: stage -> artifact.
    """
    arch = require_artifact(paths[stage], stage).arch
    assert arch is not None
    return arch


def _student_ranks(recipe: Recipe, num_ranks: int | None) -> int:
    """Return the student's ranks in a job of num_ranks; one copy of the model if it is unknown."""
    teacher = recipe.teacher
    if teacher.student_ranks:
        return teacher.student_ranks
    if num_ranks is None:
        return recipe.parallel.model_ranks
    return num_ranks - teacher.ranks_in(num_ranks) - sum(teacher.siblings.values())


def _rank_problems(recipe: Recipe, num_ranks: int | None) -> list[str]:
    """Return the roles whose ranks do not divide into copies of their model."""
    teacher = recipe.teacher
    student_ranks, teacher_ranks = _student_ranks(recipe, num_ranks), teacher.ranks_in(num_ranks)
    siblings = sum(teacher.siblings.values())
    roles = [("student", "parallel", student_ranks, recipe.parallel, teacher_ranks)]
    if teacher.is_remote:
        roles.append(("teacher", "teacher.parallel", teacher_ranks, teacher.parallel, student_ranks))
    problems = []
    for role, section, ranks, parallel, other_ranks in roles:
        if ranks > 0 and ranks % parallel.model_ranks == 0:
            continue
        share = ""
        if num_ranks and teacher.is_remote:
            share = f" ({num_ranks} minus {other_ranks + siblings} for other roles)"
        problems.append(
            f"{ranks} ranks{share} for the {role} must be a multiple of tp x pp x cp = "
            f"{parallel.model_ranks}, above 0; start another number of ranks, or change {section}"
        )
    return problems


def _batch_problems(recipe: Recipe, num_ranks: int | None) -> list[str]:
    """Return the batch sizes that do not divide over the student's ranks."""
    data_parallel = max(1, _student_ranks(recipe, num_ranks) // recipe.parallel.model_ranks)
    sizes = [
        ("distill.global_batch_size", recipe.distill.global_batch_size, recipe.distill.micro_batch_size),
    ]
    if recipe.prunes:
        sizes.append(("score.num_samples", recipe.score.num_samples, recipe.score.micro_batch_size))
    if recipe.correct:
        sizes.append(
            ("correct.global_batch_size", recipe.correct.global_batch_size, recipe.correct.micro_batch_size)
        )
    problems = [
        must_divide(name, size, micro_batch_size, data_parallel, recipe.parallel.interleaved)
        for name, size, micro_batch_size in sizes
    ]
    return [problem for problem in problems if problem]


def _model_problems(recipe: Recipe, base: Arch, teacher: Arch) -> list[str]:
    """Return the problems with layouts and model sizes. base: the model that is pruned."""
    problems = _layout_problems(recipe, base) + _teacher_problems(recipe, base, teacher)
    candidates: list[Arch] = []
    problems += problems_of(partial(_size_students, recipe, base, candidates))
    smallest = candidates[-1] if candidates else base
    if recipe.prunes and recipe.depth.method != "cosine" and candidates:
        problems += _depth_problems(recipe, base, smallest)
    problems += _fp8_problems(recipe, base, teacher, smallest)
    if recipe.distill.states and candidates:
        problems += recipe.distill.states.problems(smallest.num_layers, teacher.num_layers)
    stages = recipe.parallel.pp * (recipe.parallel.vpp or 1)
    if stages > smallest.num_layers:
        problems.append(
            f"{stages} pipeline stages (pp x vpp) for a student of {smallest.num_layers} layers; lower pp "
            "or vpp"
        )
    if candidates:
        depths = {arch.num_layers for arch in candidates}
        problems += recipe.layer_problems(depths, base.num_layers, teacher.num_layers)
    return problems


def _layout_problems(recipe: Recipe, base: Arch) -> list[str]:
    problems = layout_problems(base, recipe.parallel.tp)
    longest = base.max_position_embeddings
    if recipe.data.sequence_length > longest:
        problems.append(
            f"data.sequence_length {recipe.data.sequence_length} is above the model's "
            f"max_position_embeddings {longest}; give at most that"
        )
    search = recipe.search
    if search and search.context and search.latency_ms and search.context > longest:
        problems.append(
            f"search.context {search.context} is above the model's max_position_embeddings {longest}; "
            "give at most that"
        )
    return problems


def _teacher_problems(recipe: Recipe, base: Arch, arch: Arch) -> list[str]:
    """Return the problems of the teacher of distillation, with architecture `arch`."""
    teacher, parallel = recipe.teacher, recipe.parallel
    problems = []
    if arch.vocab_size != base.vocab_size:
        problems.append(
            f"teacher.model has a vocabulary of {arch.vocab_size}, the pruned model has "
            f"{base.vocab_size}; give a teacher with the same vocabulary"
        )
    if teacher.is_remote:
        problems += [f"teacher: {problem}" for problem in layout_problems(arch, teacher.parallel.tp)]
        if teacher.parallel.pp > arch.num_layers:
            problems.append(
                f"teacher: {teacher.parallel.pp} pipeline stages for {arch.num_layers} layers; "
                "lower teacher.parallel.pp"
            )
    if teacher.payload == "topk" and teacher.top_k > base.vocab_size:
        problems.append(
            f"teacher.top_k {teacher.top_k} is above the vocabulary of {base.vocab_size}; lower it"
        )
    if teacher.model is None and recipe.previous is None:
        return problems
    if teacher.model and Path(teacher.model).resolve() == Path(recipe.model).resolve():
        problems.append(
            f"teacher.model {teacher.model} is the folder of model, so it has no effect; remove it"
        )
        return problems
    # evaluate and search load this teacher in the student's layout.
    name = "teacher.model" if teacher.model else "the teacher"
    problems += [f"{name}: {problem}" for problem in layout_problems(arch, parallel.tp)]
    if teacher.model and recipe.data.sequence_length > arch.max_position_embeddings:
        problems.append(
            f"data.sequence_length {recipe.data.sequence_length} is above max_position_embeddings "
            f"{arch.max_position_embeddings} of teacher.model; give at most that"
        )
    stages = parallel.pp * (parallel.vpp or 1)
    if stages > arch.num_layers:
        problems.append(
            f"{name}: {stages} pipeline stages (pp x vpp) for {arch.num_layers} layers; "
            "evaluate loads it in the student's layout, so lower pp or vpp"
        )
    return problems


def _size_students(recipe: Recipe, base: Arch, students: list[Arch]) -> None:
    """Add the sizes of the student, or of all candidates of a search, to students.

    The shallowest is the last one.
    """
    from minitron_mp.models.families.export import exportable_arch
    from minitron_mp.pruning.depth import droppable_layers
    from minitron_mp.pruning.search_space import possible_students

    students.extend(sorted(possible_students(recipe, base), key=lambda arch: -arch.num_layers))
    student = students[-1]
    if recipe.search or not recipe.prunes:
        exportable_arch(student, recipe.export.family)
        return
    exportable_arch(student, recipe.export.family, recipe.target.align)
    droppable = droppable_layers(recipe.depth, base.num_layers, base.num_layers - student.num_layers)
    protected = [layer for layer in recipe.target.drop_layers or [] if layer not in droppable]
    if protected:
        raise InputError(
            f"target.drop_layers names {', '.join(map(str, protected))}, which depth.protect_first "
            f"{recipe.depth.protect_first} and protect_last {recipe.depth.protect_last} keep; "
            "name other layers, or protect fewer"
        )


def _depth_problems(recipe: Recipe, base: Arch, student: Arch) -> list[str]:
    """Return a problem if depth.method must measure layers but there is no layer to choose."""
    if recipe.target.drop_layers is not None:
        reason = "target.drop_layers names the dropped layers"
    elif student.num_layers == base.num_layers:
        reason = f"the student keeps all {base.num_layers} layers"
    else:
        return []
    return [
        f"depth.method {recipe.depth.method} has no layer to choose: {reason}; give target.num_layers, or "
        "remove the section depth"
    ]


def _fp8_problems(recipe: Recipe, base: Arch, teacher: Arch, student: Arch) -> list[str]:
    """Return the sizes that FP8 does not support."""
    corrected = teacher if recipe.corrects_during_distillation else base
    teacher_layout = recipe.teacher.parallel if recipe.teacher.is_remote else recipe.parallel
    models: list[tuple[str, Arch, ParallelConfig]] = []
    if recipe.distill.fp8:
        models.append(("distill.fp8", student, recipe.parallel))
    if recipe.correct and recipe.correct.fp8:
        models.append(("correct.fp8", corrected, recipe.parallel))
    if recipe.teacher.fp8:
        models.append(("teacher.fp8", teacher, teacher_layout))
    problems = []
    for key, arch, parallel in models:
        tokens = parallel.tokens_of_sample(recipe.data.sequence_length)
        problems += [f"{key}: {problem}" for problem in fp8_problems(arch, parallel.tp, tokens)]
    return problems
