"""Checks of the user's files before a run: models, tokenizers, text, tasks, recipes of siblings.

Only the headers of weight files are read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_mp.config.recipe import Recipe, load_recipe
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.workflow.stage_files import tokenizer_path

if TYPE_CHECKING:
    from minitron_mp.data.tokenizer import Tokenizer


def read_model(folder: str, archs: dict[str, Arch], weights: bool) -> None:
    """Add the architecture of a folder to archs, and check the headers of its weights."""
    from minitron_mp.models.hf_config import read_arch
    from minitron_mp.models.hf_weights import check_weights
    from minitron_mp.models.model_folder import has_other_weights, missing_weights_problem

    archs[folder] = read_arch(Path(folder), weights=weights)
    if not weights and has_other_weights(Path(folder)):
        raise InputError(f"{folder} cannot be used: {missing_weights_problem(Path(folder))}")
    if weights:
        check_weights(Path(folder), archs[folder])


def check_same_tokens(model: str, teacher: str) -> None:
    """Raise InputError when model and teacher have different tokens for the same id.

    An id that only one of them has does not occur in the text.
    """
    from minitron_mp.models.model_folder import special_tokens

    files = [Path(folder) / "tokenizer.json" for folder in (model, teacher)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    of_model, of_teacher = (special_tokens(file) for file in files)
    differing = sorted(id for id in of_model.keys() & of_teacher.keys() if of_model[id] != of_teacher[id])
    if differing:
        first = differing[0]
        raise InputError(
            f"the tokenizers of teacher.model and model differ in {len(differing):,} ids "
            f"({first} is {of_model[first]!r} in {files[0]}, {of_teacher[first]!r} in {files[1]}); "
            "give a teacher with the same tokenizer"
        )


def file_problems(
    recipe: Recipe, paths: Mapping[str, Path], arch: Arch | None, deleted: Collection[str]
) -> list[str]:
    """Return the problems of the user's files other than the models.

    arch: architecture of the model; None if its folder cannot be used. paths, deleted: as in
    recipe_problems().
    """
    tokenizers: list[Tokenizer] = []
    problems = []
    if arch is not None:
        folder = available_tokenizer(recipe, paths, deleted)
        problems += problems_of(partial(_load_tokenizer, folder, arch, tokenizers))
    tokenizer = tokenizers[0] if tokenizers else None
    problems += _text_problems(recipe, tokenizer, deleted) + _task_problems(recipe, tokenizer, deleted)
    problems += _baseline_problems(recipe) + _sibling_problems(recipe)
    return problems


def available_tokenizer(recipe: Recipe, paths: Mapping[str, Path], deleted: Collection[str]) -> Path:
    """Return the tokenizer of a recipe before a run: the user's, or its copy if that was deleted.

    paths, deleted: as in recipe_problems().
    """
    stage = "data" if recipe.data.tokenizer else "import"
    return tokenizer_path(recipe, paths) if stage in deleted else Path(recipe.data.tokenizer or recipe.model)


def _load_tokenizer(path: Path, arch: Arch, tokenizers: list[Tokenizer]) -> None:
    """Add the tokenizer of the text to tokenizers."""
    from minitron_mp.data.tokenizer import for_model, load_tokenizer

    if not path.exists():
        raise InputError(
            f"data.tokenizer: {path} does not exist; give a Hugging Face folder or a sentencepiece "
            ".model file"
        )
    tokenizers.append(for_model(load_tokenizer(path), arch.vocab_size))


def _text_problems(recipe: Recipe, tokenizer: Tokenizer | None, deleted: Collection[str]) -> list[str]:
    from minitron_mp.data.checks import corpus_problems
    from minitron_mp.data.sources import find_sources, shared_parts

    problems = corpus_problems(
        recipe.data,
        recipe.run.root,
        tokenizer,
        parts="data" not in deleted,
        held_out="texts" not in deleted,
        seed=recipe.seed,
    )
    if recipe.search is None or not recipe.data.train or problems or "data" in deleted:
        return problems
    sources = find_sources(recipe.data, output=recipe.run.root)
    shared = shared_parts(sources, recipe.data, "calibration", "train")
    if not shared:
        return []
    more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
    return [
        f"data.calibration and data.train share {', '.join(shared[:3])}{more}: search ranks students on "
        "calibration text, which their distillation must not use; use other files for "
        "data.calibration, or give data.source"
    ]


def _task_problems(recipe: Recipe, tokenizer: Tokenizer | None, deleted: Collection[str]) -> list[str]:
    from minitron_mp.evaluation.task_files import check_tokens, read_task_file

    def check(path: Path, limit: int | None) -> None:
        items = read_task_file(path, limit)
        if tokenizer is not None:
            check_tokens(items, tokenizer, path)

    tasks = {
        f"evaluate.tasks.{name}": (path, recipe.evaluate.task_items)
        for name, path in recipe.evaluate.tasks.items()
    }
    if recipe.depth.task:
        tasks["depth.task"] = recipe.depth.task, recipe.depth.task_items
    problems = []
    for name, (path, limit) in tasks.items():
        if name.split(".")[0] in deleted and not Path(path).exists():
            continue
        problems += [f"{name}: {row}" for row in problems_of(partial(check, Path(path), limit))]
    return problems


def _baseline_problems(recipe: Recipe) -> list[str]:
    baseline = recipe.correct.baseline if recipe.correct else None
    if baseline is None:
        return []
    if Path(baseline).resolve() == recipe.root.resolve():
        return [
            f"correct.baseline: {baseline} is the output of this recipe; "
            "give the output of a finished run without correction"
        ]
    if not (Path(baseline) / "evaluation.json").is_file():
        return [
            f"correct.baseline: {baseline} has no evaluation.json; "
            "give the output of a finished run without correction"
        ]
    return []


def _sibling_problems(recipe: Recipe) -> list[str]:
    """Return the recipes of siblings that cannot be read or have the output of another student."""
    problems: list[str] = []
    outputs = {recipe.root.resolve(): "this recipe"}
    for path in recipe.teacher.siblings:
        try:
            sibling = load_recipe(path)
        except InputError as error:
            problems.append(f"teacher.siblings: {error}")
            continue
        other = outputs.setdefault(sibling.root.resolve(), path)
        if other != path:
            problems.append(
                f"teacher.siblings: {path} has the output {sibling.output} of {other}; "
                "give each student its own output"
            )
    return problems


def problems_of(check: Callable[[], object]) -> list[str]:
    """Return the lines of the InputError that check() raises, each after the title; [] without one."""
    try:
        check()
    except InputError as error:
        title, *rows = str(error).splitlines()
        return [f"{title} {row.removeprefix('  - ')}" for row in rows] or [title]
    return []
