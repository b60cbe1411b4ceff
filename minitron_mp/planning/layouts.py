"""Rules of layouts: which are possible on a number of GPUs, and why others are not."""

from __future__ import annotations

from minitron_mp.config.engine_rules import engine_problems
from minitron_mp.models.arch import fp8_problems, layout_problems
from minitron_mp.planning.case import PlanningCase
from minitron_mp.planning.estimate import Estimate
from minitron_mp.planning.memory import GIB
from minitron_mp.planning.times import Times

HEADS = "tp does not divide heads, query groups, ffn or vocabulary"
DIVIDES = "number of GPUs is not a multiple of tp x pp x cp"
DEPTH = "more pipeline stages than layers"
SEQUENCE = "sequence length is not a multiple of 2 cp x tp"
FP8_SIZES = "FP8 needs multiples of 16 on each rank"
ENGINE = "cuda_graphs or tp_comm_overlap do not support the layout or placement"
BATCH = "no batch within 10% is a multiple of microbatch x dp (x pp with vpp)"
BATCH_DIVIDES = "global batch is not a multiple of microbatch x dp (x pp with vpp)"
MEMORY = "needs more memory than the GPU has"


def layout_problem(case: PlanningCase, times: Times) -> str | None:
    """Return why the recipe's layout is impossible, without regard to memory; None if possible."""
    return sizes_problem(case, times) or batch_problem(case)


def sizes_problem(case: PlanningCase, times: Times) -> str | None:
    """Return why the sizes of the layout are impossible with these models and GPUs; else None."""
    p = case.recipe.parallel
    t = case.recipe.teacher
    models = [case.student] if t.is_remote else [case.student, case.teacher]
    if case.student_ranks < p.model_ranks or case.student_ranks % p.model_ranks:
        return DIVIDES
    if t.is_remote and (case.teacher_ranks < 1 or case.teacher_ranks % t.parallel.model_ranks):
        return DIVIDES
    if p.tp > times.hardware.gpus_per_node or any(layout_problems(arch, p.tp) for arch in models):
        return HEADS
    if p.pp * (p.vpp or 1) > min(arch.num_layers for arch in models):
        return DEPTH
    if case.recipe.data.sequence_length % p.sequence_multiple:
        return SEQUENCE
    if _has_fp8_problem(case):
        return FP8_SIZES
    return ENGINE if engine_problems(case.recipe) else None


def _has_fp8_problem(case: PlanningCase) -> bool:
    sequence_length = case.recipe.data.sequence_length
    student_layout = case.recipe.parallel
    t = case.recipe.teacher
    teacher_layout = t.parallel if t.is_remote else student_layout
    for arch, fp8, layout in (
        (case.student, case.recipe.distill.fp8, student_layout),
        (case.teacher, t.fp8, teacher_layout),
    ):
        if fp8 and fp8_problems(arch, layout.tp, layout.tokens_of_sample(sequence_length)):
            return True
    return False


def batch_problem(case: PlanningCase) -> str | None:
    """Return BATCH if the global batch does not divide; else None."""
    p = case.recipe.parallel
    d = case.recipe.distill
    unit = d.micro_batch_size * (case.student_ranks // p.model_ranks) * p.interleaved
    return BATCH_DIVIDES if d.global_batch_size % unit else None


def fits(estimate: Estimate, times: Times) -> bool:
    """Return whether the fullest GPU has enough memory."""
    return estimate.needed_bytes <= times.hardware.usable_gib * GIB
