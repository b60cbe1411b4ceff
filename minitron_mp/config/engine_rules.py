"""Rules for FP8 and the other keys of Transformer Engine. rules.py defines what a rule is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from minitron_mp.config.training import TrainingConfig

if TYPE_CHECKING:
    from minitron_mp.config.recipe import Recipe


def engine_problems(recipe: Recipe) -> list[str]:
    """Return the problems of ENGINE_RULES alone, for the layout planner."""
    return [problem for rule in ENGINE_RULES for problem in rule(recipe)]


def training_sections(recipe: Recipe) -> Iterator[tuple[str, TrainingConfig]]:
    """Yield (section name, settings) of each training run of the recipe."""
    if recipe.correct:
        yield "correct", recipe.correct
    yield "distill", recipe.distill


def engine_is_transformer_engine(recipe: Recipe) -> list[str]:
    if recipe.transformer_impl != "local":
        return []
    problems = []
    for name, training in training_sections(recipe):
        keys = [
            f"{name}.{key}" for key in ("fp8", "tp_comm_overlap", "cuda_graphs") if getattr(training, key)
        ]
        if keys:
            problems.append(_needs_transformer_engine(", ".join(keys)))
    if recipe.teacher.fp8:
        problems.append(_needs_transformer_engine("teacher.fp8"))
    return problems


def _needs_transformer_engine(keys: str) -> str:
    return (
        f"{keys} needs Transformer Engine, transformer_impl is local; set transformer_impl: "
        "transformer_engine or auto"
    )


def _trained_precisions(recipe: Recipe) -> dict[str, str]:
    """Return section -> precision of the model that it trains."""
    during = recipe.corrects_during_distillation
    return {
        "correct": recipe.teacher_precision if during else recipe.precision,
        "distill": recipe.precision,
    }


def optimizer_needs_bf16(recipe: Recipe) -> list[str]:
    precisions = _trained_precisions(recipe)
    return [
        f"{name}.{key} bf16 needs a bf16 model, the precision is fp32; set precision: bf16, or drop {key}"
        for name, training in training_sections(recipe)
        for key in ("gradient_precision", "moment_precision")
        if getattr(training, key) == "bf16" and precisions[name] == "fp32"
    ]


def fp8_needs_bf16(recipe: Recipe) -> list[str]:
    precisions = _trained_precisions(recipe)
    problems = [
        f"{name}.fp8 needs bf16, the precision is fp32; set precision: bf16, or drop fp8"
        for name, training in training_sections(recipe)
        if training.fp8 and precisions[name] == "fp32"
    ]
    if recipe.teacher.fp8 and recipe.teacher_precision == "fp32":
        problems.append(
            "teacher.fp8 needs bf16, the teacher's precision is fp32; set teacher.precision: bf16, or "
            "drop fp8"
        )
    return problems


def communication_overlap(recipe: Recipe) -> list[str]:
    problems = []
    for name, training in training_sections(recipe):
        if not training.tp_comm_overlap:
            continue
        if not recipe.parallel.sequence_parallel:
            problems.append(
                f"{name}.tp_comm_overlap needs sequence parallelism; set parallel.sequence_parallel: true, "
                "or drop it"
            )
        if training.fp8 == "blockwise":
            problems.append(
                f"{name}.tp_comm_overlap does not support {name}.fp8 blockwise; set tensorwise, or drop "
                "tp_comm_overlap"
            )
        if training.cuda_graphs:
            problems.append(
                f"{name}.tp_comm_overlap and {name}.cuda_graphs cannot be combined (untested); drop one of "
                "them"
            )
    return problems


def cuda_graphs(recipe: Recipe) -> list[str]:
    problems = []
    for name, training in training_sections(recipe):
        if not training.cuda_graphs:
            continue
        if training.fp8 not in (None, "tensorwise"):
            problems.append(
                f"{name}.cuda_graphs needs {name}.fp8 tensorwise, given {training.fp8}; set tensorwise, or "
                "drop cuda_graphs"
            )
        if training.fp8 and recipe.parallel.pp > 1:
            problems.append(
                f"{name}.cuda_graphs with {name}.fp8 and pipeline stages: Megatron-Core 0.19 would replay "
                "the FP8 weights of the second step; set parallel.pp: 1, or drop one of them"
            )
        if recipe.parallel.vpp:
            problems.append(
                f"{name}.cuda_graphs does not support parallel.vpp {recipe.parallel.vpp}; drop one of them"
            )
    return problems


def one_trained_model(recipe: Recipe) -> list[str]:
    """Return the settings whose buffers or graphs support one trained model only."""
    correct, distill = recipe.correct, recipe.distill
    problems = []
    if correct and recipe.corrects_during_distillation:
        if distill.fp8 == "delayed" and correct.fp8:
            problems.append(
                "distill.fp8 delayed keeps a history that the FP8 layers of the trained teacher would "
                "change; set tensorwise"
            )
        if distill.tp_comm_overlap or correct.tp_comm_overlap:
            problems.append(
                "tp_comm_overlap has buffers for one model, and correct.when during trains two; drop it"
            )
        if distill.cuda_graphs or correct.cuda_graphs:
            problems.append("cuda_graphs records one model, and correct.when during trains two; drop it")
        if recipe.teacher.fp8:
            problems.append(
                "teacher.fp8 is for a frozen teacher; with correct.when during set correct.fp8 instead"
            )
    if distill.cuda_graphs and recipe.teacher.is_remote:
        problems.append(
            "distill.cuda_graphs does not support a remote teacher, because its signals arrive in another "
            "thread while graphs are recorded; set teacher.placement: colocated or cached, or drop "
            "cuda_graphs"
        )
    if recipe.search and distill.cuda_graphs:
        problems.append(
            "distill.cuda_graphs records one model, and search trains several; give the sizes in target, "
            "or drop it"
        )
    if recipe.search and distill.tp_comm_overlap:
        problems.append(
            "distill.tp_comm_overlap has buffers for one model, and search trains several; "
            "give the sizes in target, or drop it"
        )
    return problems


ENGINE_RULES: tuple[Callable[[Recipe], list[str]], ...] = (
    engine_is_transformer_engine,
    optimizer_needs_bf16,
    fp8_needs_bf16,
    communication_overlap,
    cuda_graphs,
    one_trained_model,
)
