"""Everything about a recipe that would stop a stage later on, found in a second before any work. Reads headers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.data.corpus import corpus_problems, shared_parts
from minitron_mp.errors import InputError, must_divide
from minitron_mp.evaluation.task_files import read_task_file
from minitron_mp.models.arch import Arch, fp8_problems, layout_problems
from minitron_mp.models.hf_config import read_arch
from minitron_mp.models.hf_weights import check_weights, special_tokens
from minitron_mp.pruning.depth import droppable_layers
from minitron_mp.pruning.search_space import search_candidates
from minitron_mp.pruning.target import exportable_arch, resolve_target


def recipe_problems(
    recipe: Recipe, paths: Mapping[str, Path], num_ranks: int | None = None, *, weights: bool = True
) -> list[str]:
    """One sentence each; empty when nothing stops it. paths: stage -> artefact. weights: False to look at the models' config.json alone.

    num_ranks: of the job, where it is known; else one copy of the model is assumed.
    """
    found: dict[str, Arch] = {}

    def read(folder: str) -> None:
        found[folder] = read_arch(Path(folder), weights=weights)
        if weights:
            check_weights(Path(folder), found[folder])

    tutor = recipe.teacher.model or recipe.model
    problems = [
        problem for folder in dict.fromkeys([recipe.model, tutor]) for problem in _told(partial(read, folder))
    ]
    problems += _told(partial(_same_tokens, recipe.model, tutor))
    if weights:
        problems += _files(recipe, paths)
    if not recipe.target.given and not recipe.search:
        problems.append("target says nothing; give sizes, max_parameters or keep, or a section search")
    dp, too_few = _ranks(recipe, num_ranks)
    return (
        problems
        + too_few
        + _batches(recipe, dp)
        + (_model(recipe, found[recipe.model], found[tutor]) if {recipe.model, tutor} <= found.keys() else [])
    )


def _told(check: Callable[[], None]) -> list[str]:
    """The rows of the InputError that check() raises."""
    try:
        check()
    except InputError as error:
        title, *rows = str(error).splitlines()
        return [f"{title} {row.removeprefix('  - ')}" for row in rows] or [title]
    return []


def _same_tokens(model: str, tutor: str) -> None:
    """InputError when an id means one token to the model and another one to the teacher. Ids that only one has a token for are no text's."""
    one, other = Path(model) / "tokenizer.json", Path(tutor) / "tokenizer.json"
    if not (one.is_file() and other.is_file()) or one.read_bytes() == other.read_bytes():
        return
    own, theirs = special_tokens(one), special_tokens(other)
    if differ := sorted(id for id in own.keys() & theirs.keys() if own[id] != theirs[id]):
        example = f"{differ[0]} is {own[differ[0]]!r} in {one}, {theirs[differ[0]]!r} in {other}"
        raise InputError(
            f"teacher.model has another tokenizer than model: {len(differ):,} ids differ ({example}); give a teacher with the same one"
        )


def _files(recipe: Recipe, paths: Mapping[str, Path]) -> list[str]:
    problems = corpus_problems(recipe.data)
    if (
        recipe.search
        and recipe.data.train
        and not problems
        and (both := shared_parts(recipe.data, "calibration", "train"))
    ):
        named = f"{', '.join(both[:3])}{f' and {len(both) - 3} more' * (len(both) > 3)}"
        why = "search ranks students on calibration text, which their distillation must not have seen"
        problems.append(
            f"data.calibration and data.train share {named}: {why}; hold some text out, or give data.source"
        )
    tasks = {
        f"evaluate.tasks.{name}": (path, recipe.evaluate.task_items)
        for name, path in recipe.evaluate.tasks.items()
    }
    if recipe.depth.task:
        tasks["depth.task"] = recipe.depth.task, recipe.depth.task_items
    for name, (path, limit) in tasks.items():
        problems += [f"{name}: {problem}" for problem in _told(partial(read_task_file, Path(path), limit))]
    if recipe.correct and (baseline := recipe.correct.baseline):
        if Path(baseline).resolve() == recipe.root.resolve():
            problems.append(
                f"correct.baseline: {baseline} is the output of this recipe; name that of a finished run without correction"
            )
        elif not (Path(baseline) / "evaluation.json").is_file():
            problems.append(
                f"correct.baseline: {baseline} holds no evaluation.json; name the output of a finished run without correction"
            )
    tokenizer, model = recipe.data.tokenizer, Path(recipe.model).resolve()
    if tokenizer is not None and not Path(tokenizer).exists():
        problems.append(
            f"data.tokenizer: {tokenizer} does not exist; give a Hugging Face folder or a sentencepiece .model file"
        )
    problems += [
        f"model: {recipe.model} would be overwritten by the stage {name}; set another output"
        for name, p in paths.items()
        if p.resolve() == model
    ]
    return problems


def _ranks(recipe: Recipe, num_ranks: int | None) -> tuple[int, list[str]]:
    """The student's data parallel size, and what is wrong with how the ranks are shared out."""
    t, layout = recipe.teacher, recipe.parallel
    teachers, siblings = t.ranks_in(num_ranks), sum(t.siblings.values())
    own = t.student_ranks or (num_ranks - teachers - siblings if num_ranks else layout.model_ranks)
    roles = [("student", own, layout, "teacher", teachers)]
    if t.is_remote:
        roles.append(("teacher", teachers, t.parallel, "student", own))
    problems = []
    for role, ranks, p, other, taken in roles:
        if ranks <= 0 or ranks % p.model_ranks:
            less = (
                f" ({num_ranks} less the {other}'s {taken + siblings})" if num_ranks and t.is_remote else ""
            )
            problems.append(
                f"{ranks} ranks{less} for the {role} is no multiple of tp x pp x cp = {p.model_ranks}"
            )
    return max(1, own // layout.model_ranks), problems


def _batches(recipe: Recipe, dp: int) -> list[str]:
    sizes = [
        ("distill.global_batch_size", recipe.distill.global_batch_size, recipe.distill),
        ("score.num_samples", recipe.score.num_samples, recipe.score),
    ]
    if c := recipe.correct:
        sizes.append(("correct.global_batch_size", c.global_batch_size, c))
    return [
        p
        for name, size, section in sizes
        if (p := must_divide(name, size, section.micro_batch_size, dp, recipe.parallel.interleaved))
    ]


def _model(recipe: Recipe, arch: Arch, tutor: Arch) -> list[str]:
    """What the sizes of the model, and of the one that teaches, rule out."""
    p, t = recipe.parallel, recipe.teacher
    problems, students, stages = layout_problems(arch, p.tp), [arch], p.pp * (p.vpp or 1)
    if tutor.vocab_size != arch.vocab_size:
        problems.append(
            f"teacher.model has a vocabulary of {tutor.vocab_size}, the model that is cut {arch.vocab_size}; they must have the same"
        )
    if (length := recipe.data.sequence_length) > arch.max_position_embeddings:
        problems.append(
            f"data.sequence_length {length} is above the model's max_position_embeddings {arch.max_position_embeddings}"
        )
    if (s := recipe.search) and s.context and s.latency_ms and s.context > arch.max_position_embeddings:
        problems.append(
            f"search.context {s.context} is above the model's max_position_embeddings {arch.max_position_embeddings}"
        )
    if t.is_remote:
        problems += [f"teacher: {problem}" for problem in layout_problems(tutor, t.parallel.tp)]
        if t.parallel.pp > tutor.num_layers:
            problems.append(f"teacher: {t.parallel.pp} pipeline stages for {tutor.num_layers} layers")
    if t.model and Path(t.model).resolve() == Path(recipe.model).resolve():
        problems.append(f"teacher.model {t.model} is the folder of model, so it has no effect; drop it")
    elif t.model:  # evaluate and search load it in the student's layout
        problems += [f"teacher.model: {problem}" for problem in layout_problems(tutor, p.tp)]
        if length > tutor.max_position_embeddings:
            problems.append(
                f"data.sequence_length {length} is above max_position_embeddings {tutor.max_position_embeddings} of teacher.model"
            )
        if stages > tutor.num_layers:
            problems.append(
                f"teacher.model: {stages} pipeline stages (pp x vpp) for {tutor.num_layers} layers; evaluate has it in the student's layout"
            )
    if t.payload == "topk" and t.top_k > arch.vocab_size:
        problems.append(f"teacher.top_k {t.top_k} is above the vocabulary of {arch.vocab_size}")
    if t.payload == "topk" and recipe.distill.divergence != "forward_kl":
        problems.append(f"teacher.payload topk has no divergence {recipe.distill.divergence}; use forward_kl")

    def size_student() -> None:
        if recipe.search:
            students.extend(
                sorted(search_candidates(recipe, arch), key=lambda a: -a.num_layers)
            )  # the shallowest last
            exportable_arch(students[-1], recipe.export.family)
            return
        students.append(resolve_target(arch, recipe.target, p.tp, recipe.export.family))
        exportable_arch(students[-1], recipe.export.family)
        free = droppable_layers(recipe.depth, arch.num_layers, arch.num_layers - students[-1].num_layers)
        if protected := [layer for layer in recipe.target.drop_layers or [] if layer not in free]:
            said = f"depth.protect_first {recipe.depth.protect_first} and protect_last {recipe.depth.protect_last} keep"
            raise InputError(
                f"target.drop_layers names {', '.join(map(str, protected))}, which {said}; name others, or protect fewer"
            )

    problems += _told(size_student)
    usual = type(recipe.depth)()
    samples = [
        name
        for name in ("num_samples", "micro_batch_size")
        if getattr(recipe.depth, name) != getattr(usual, name)
    ]
    if recipe.depth.method == "cosine" and samples:
        why = "without effect with depth.method cosine, which measures nothing"
        problems.append(
            f"depth.{', depth.'.join(samples)}: {why}; drop it, or set depth.method: drop, block or greedy"
        )
    if (
        recipe.depth.method != "cosine"
        and len(students) > 1
        and (recipe.target.drop_layers is not None or students[-1].num_layers == arch.num_layers)
    ):
        why = (
            "target.drop_layers names the layers that go"
            if recipe.target.drop_layers is not None
            else f"the student keeps all {arch.num_layers} layers"
        )
        problems.append(
            f"depth.method {recipe.depth.method} has nothing to choose, {why}; have layers go, or drop the section depth"
        )
    if recipe.distill.fp8:
        problems += [f"distill.fp8: {problem}" for problem in _fp8(recipe, students[-1], p)]
    if recipe.correct and recipe.correct.fp8:
        problems += [
            f"correct.fp8: {problem}"
            for problem in _fp8(recipe, tutor if recipe.corrects_meanwhile else arch, p)
        ]
    if t.fp8:
        problems += [
            f"teacher.fp8: {problem}" for problem in _fp8(recipe, tutor, t.parallel if t.is_remote else p)
        ]
    if recipe.distill.states and len(students) > 1:
        problems += recipe.distill.states.problems(students[-1].num_layers, tutor.num_layers)
    if stages > students[-1].num_layers:
        problems.append(
            f"{stages} pipeline stages (pp x vpp) for a student of {students[-1].num_layers} layers"
        )
    return problems


def _fp8(recipe: Recipe, arch: Arch, p: ParallelConfig) -> list[str]:
    return fp8_problems(arch, p.tp, p.tokens_of_sample(recipe.data.sequence_length))
