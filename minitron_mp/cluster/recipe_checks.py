"""Checks of a recipe on this machine: model, text, tokenizer, free disk space."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_mp.cluster.checks import CheckResult, failed, ok, warning
from minitron_mp.cluster.network import RankTable
from minitron_mp.config.recipe import Recipe
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch

if TYPE_CHECKING:
    from minitron_mp.workflow.graph import StageGraph

MIN_FREE_FILES = 10_000
"""A smaller number of free files causes a warning."""


def check_recipe(recipe: Recipe, job: RankTable, job_size: int | None) -> list[CheckResult]:
    """Check model, text and settings on every rank; tokenizer and disk space on rank 0.

    job_size: number of ranks; None without a launcher.
    """
    from minitron_mp.data.sources import find_all_sources, unused_text
    from minitron_mp.models.hf_config import read_arch
    from minitron_mp.models.model_folder import has_weights
    from minitron_mp.workflow.file_checks import available_tokenizer
    from minitron_mp.workflow.graph import StageGraph
    from minitron_mp.workflow.output_folder import output_problems
    from minitron_mp.workflow.preflight import artifact_arch, recipe_problems

    teacher_folder = recipe.teacher.model or recipe.model
    models = [Path(folder) for folder in dict.fromkeys([recipe.model, teacher_folder])]
    try:
        project = StageGraph(recipe)
        deleted = project.deleted_sources()
        weights = bool(deleted) or all(has_weights(folder) for folder in models if folder.is_dir())
        problems: list[str] = []
        for each in project.rounds():
            problems += output_problems(each.recipe, each.paths, report=True)
            problems += recipe_problems(
                each.recipe, each.paths, job_size, weights=weights, deleted=set(deleted)
            )
    except InputError as error:
        return [failed("recipe", str(error))]
    if problems:
        return [failed("recipe", problem) for problem in dict.fromkeys(problems)]
    results = [ok("recipe", f"valid; models: {', '.join(map(str, models))}")]
    not_used = ""
    if weights:
        sources = find_all_sources(
            recipe.data, recipe.root, parts="data" not in deleted, held_out="texts" not in deleted
        )
        not_used = unused_text(sources).summary()
    if not_used:
        results.append(warning("text", f"not used: {not_used}", "convert or unpack what is text"))
    if not weights:
        detail = "the folder has config.json but no weights"
        results.append(warning("model", detail, "download model.safetensors before a run"))
    if job.rank == 0:
        teacher_stage = "import-teacher" if recipe.teacher.model else "import"
        base, teacher = (
            artifact_arch(project.paths, stage) if stage in deleted else read_arch(folder, weights=False)
            for folder, stage in ((models[0], "import"), (models[-1], teacher_stage))
        )
        results.append(check_tokenizer(available_tokenizer(recipe, project.paths, deleted), base))
        results.append(check_disk_space(project, base, teacher))
    return results


def check_cuda_graphs(recipe: Recipe | None) -> list[CheckResult]:
    """Check that Megatron-Core supports the recipe's CUDA graphs; [] if it has none."""
    from minitron_mp.models.precision import check_cuda_graphs as require_cuda_graphs

    if recipe is None:
        return []
    in_correction = recipe.correct is not None and recipe.correct.cuda_graphs
    if not (recipe.distill.cuda_graphs or in_correction):
        return []
    try:
        require_cuda_graphs()
    except InputError as error:
        return [failed("CUDA graphs", str(error))]
    return [ok("CUDA graphs", "supported by this Megatron-Core")]


def requested_fp8(recipe: Recipe | None) -> dict[str, str]:
    """Return key of the recipe -> requested kind of FP8 scaling."""
    if recipe is None:
        return {}
    kinds = {
        "distill.fp8": recipe.distill.fp8,
        "correct.fp8": recipe.correct.fp8 if recipe.correct else None,
        "teacher.fp8": recipe.teacher.fp8,
    }
    return {key: kind for key, kind in kinds.items() if kind}


def check_tokenizer(folder: Path, arch: Arch) -> CheckResult:
    """Check that the tokenizer loads, and whether the model has an embedding for each of its ids."""
    from minitron_mp.data.tokenizer import for_model, load_tokenizer

    try:
        tokenizer = for_model(load_tokenizer(folder), arch.vocab_size)
    except InputError as error:
        return failed("tokenizer", str(error))
    if tokenizer.num_embeddings is not None:
        return warning(
            "tokenizer",
            f"{folder}: ids up to {tokenizer.vocab_size - 1}, the model's embedding has {arch.vocab_size} "
            "rows; a text with a larger id is rejected",
            "set data.tokenizer, unless the larger ids are added tokens that no text contains",
        )
    return ok("tokenizer", f"{folder}: {tokenizer.vocab_size:,} tokens, end-of-document id {tokenizer.eod}")


def check_disk_space(project: StageGraph, base: Arch, teacher: Arch) -> CheckResult:
    """Compare free space and files with the output of the stages that have not run.

    base: the model that is pruned. teacher: the teacher of distillation.
    """
    from minitron_mp.artifacts.checkpoint import FREE_SPACE_MARGIN

    missing = {
        each.command(name): size
        for each in project.rounds()
        for name, size in artifact_bytes(each, base, teacher).items()
        if not each.paths[name].exists()
    }
    root = project.recipe.root.absolute()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    free_files = os.statvfs(existing).f_favail
    needed = sum(missing.values()) * FREE_SPACE_MARGIN
    detail = (
        f"{existing} has {free / 1e9:,.1f} GB free; the remaining stages write about {needed / 1e9:,.1f} GB"
    )
    largest = sorted(missing, key=lambda name: -missing[name])[:3]
    if largest:
        detail += f" ({', '.join(f'{name} {missing[name] / 1e9:,.1f}' for name in largest)})"
    if needed > free:
        return failed("space", detail, "delete files, set another output, or lower distill.keep_checkpoints")
    if 0 < free_files < MIN_FREE_FILES:
        return warning(
            "space",
            f"{existing} has room for only {free_files:,} more files",
            "delete files: a sharded checkpoint has several files for each rank",
        )
    return ok("space", detail)


def artifact_bytes(project: StageGraph, base: Arch, teacher: Arch) -> dict[str, float]:
    """Return stage -> bytes of its artifact and of its training checkpoints.

    It lists only stages of this round that write models or teacher signals. base, teacher: as in
    check_disk_space(); base is the model of the first round.
    """
    from minitron_mp.workflow.disk_sizes import DiskSizes
    from minitron_mp.workflow.settings import base_arch

    pruned = base_arch(project.recipe) if project.earlier else base
    sizes = DiskSizes(project.recipe, base, teacher, pruned)
    num_bytes = {name: project.stages[name].disk_bytes(sizes) for name in project.stages_of_compress()}
    return {name: size for name, size in num_bytes.items() if size}
