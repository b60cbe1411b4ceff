"""Checks of a recipe on this machine: model, text, tokenizer, free disk space."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from minitron_mp.artifacts.files import ASSETS
from minitron_mp.cluster.checks import CheckResult, failed, ok, warning
from minitron_mp.cluster.network import RankTable
from minitron_mp.config.recipe import Recipe
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.models.number_formats import BYTES
from minitron_mp.planning.memory import payload_bytes_per_token, rank_parameters

MIN_FREE_FILES = 10_000
"""A smaller number of free files causes a warning."""


def check_recipe(recipe: Recipe, job: RankTable, job_size: int | None) -> list[CheckResult]:
    """Check model, text and settings on every rank; tokenizer and disk space on rank 0.

    job_size: number of ranks; None without a launcher.
    """
    from minitron_mp.models.hf_config import has_weights, read_arch
    from minitron_mp.workflow.graph import StageGraph
    from minitron_mp.workflow.output_folder import output_problems
    from minitron_mp.workflow.preflight import artifact_arch, recipe_problems

    teacher_folder = recipe.teacher.model or recipe.model
    models = [Path(folder) for folder in dict.fromkeys([recipe.model, teacher_folder])]
    try:
        project = StageGraph(recipe)
        deleted = project.deleted_sources()
        weights = bool(deleted) or all(has_weights(folder) for folder in models if folder.is_dir())
        problems = output_problems(recipe, project.paths, report=True)
        problems += recipe_problems(recipe, job_size, weights=weights, deleted=set(deleted))
    except InputError as error:
        return [failed("recipe", str(error))]
    if problems:
        return [failed("recipe", problem) for problem in problems]
    results = [ok("recipe", f"valid; models: {', '.join(map(str, models))}")]
    if not weights:
        detail = "the folder has config.json but no weights"
        results.append(warning("model", detail, "download model.safetensors before a run"))
    if job.rank == 0:
        teacher_stage = "import-teacher" if recipe.teacher.model else "import"
        base, teacher = (
            artifact_arch(recipe, stage) if stage in deleted else read_arch(folder, weights=False)
            for folder, stage in ((models[0], "import"), (models[-1], teacher_stage))
        )
        results.append(check_tokenizer(recipe, base))
        results.append(check_disk_space(recipe, project.paths, base, teacher))
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


def check_tokenizer(recipe: Recipe, arch: Arch) -> CheckResult:
    """Check that the tokenizer loads, and that the model has an embedding for each of its ids."""
    from minitron_mp.data.tokenizer import check_vocabulary, load_tokenizer

    folder = recipe.data.tokenizer or recipe.model
    imported = recipe.root / "teacher" / ASSETS
    if not recipe.data.tokenizer and not Path(folder).exists() and imported.exists():
        folder = str(imported)
    try:
        tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, arch.vocab_size)
    except InputError as error:
        return failed("tokenizer", str(error))
    return ok("tokenizer", f"{folder}: {tokenizer.vocab_size:,} tokens, end-of-document id {tokenizer.eod}")


def check_disk_space(recipe: Recipe, paths: Mapping[str, Path], base: Arch, teacher: Arch) -> CheckResult:
    """Compare free space and files with the output of the stages that have not run.

    paths: stage -> artifact. base: the model that is pruned.
    """
    from minitron_mp.artifacts.checkpoint import FREE_SPACE_MARGIN

    missing = {
        name: size
        for name, size in artifact_bytes(recipe, base, teacher).items()
        if name in paths and not paths[name].exists()
    }
    root = recipe.root.absolute()
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


def artifact_bytes(recipe: Recipe, base: Arch, teacher: Arch) -> dict[str, float]:
    """Return stage -> bytes of its artifact and of its training checkpoints.

    It lists only stages that write models or teacher signals. base: the model that is pruned.
    """
    d = recipe.distill
    size = BYTES[recipe.precision]
    num_base = _num_parameters(base, recipe)
    num_student = max(_num_parameters(arch, recipe) for arch in _possible_students(recipe, base))
    model = _model_bytes(recipe.model, base, recipe)
    correction = 0.0
    if recipe.correct:
        correction = _training_bytes(num_base, size, recipe.correct.keep_checkpoints)
    distillation = _training_bytes(num_student, size, d.keep_checkpoints)
    if recipe.corrects_during_distillation:
        distillation += correction
    num_tokens = d.steps * d.global_batch_size * recipe.data.sequence_length
    return {
        "import": model,
        "import-teacher": _model_bytes(recipe.teacher.model or recipe.model, teacher, recipe),
        "correct": correction,
        "prune": model * num_student / num_base,
        "cache": num_tokens * payload_bytes_per_token(teacher, recipe),
        "distill": distillation,
        "export": BYTES[recipe.export.dtype or recipe.precision] * num_student,
    }


def _possible_students(recipe: Recipe, base: Arch) -> list[Arch]:
    from minitron_mp.pruning.search_space import search_candidates
    from minitron_mp.pruning.target import resolve_target

    if recipe.search:
        return list(search_candidates(recipe, base))
    return [resolve_target(base, recipe.target, recipe.parallel.tp, recipe.export.family)]


def _num_parameters(arch: Arch, recipe: Recipe) -> int:
    """Return the parameters of a model over all ranks, with vocabulary padding."""
    one_rank = recipe.parallel.model_copy(update={"tp": 1, "pp": 1, "vpp": None})
    return rank_parameters(arch, one_rank)[0]


def _model_bytes(folder: str, arch: Arch, recipe: Recipe) -> float:
    """Return the size of the weight files of a model, or an estimate if there are none."""
    on_disk = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return on_disk or BYTES[recipe.precision] * _num_parameters(arch, recipe)


def _training_bytes(num_parameters: int, size: int, keep_checkpoints: int) -> float:
    """Return the bytes of the model, the kept checkpoints, and the checkpoint that is being written.

    Checkpoints have float32 weights and moments.
    """
    return size * num_parameters + (size + 12) * num_parameters * (keep_checkpoints + 1)
