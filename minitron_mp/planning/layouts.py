"""Search over the layouts of a recipe on a number of GPUs: which are possible, and which is fastest."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from minitron_mp.config.distillation import TeacherConfig
from minitron_mp.config.engine_rules import engine_problems
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.models.arch import fp8_problems, layout_problems
from minitron_mp.planning.case import PlanningCase
from minitron_mp.planning.memory import GIB, remote_teacher_memory
from minitron_mp.planning.step_time import Estimate, estimate_distillation
from minitron_mp.planning.times import Times

TENSOR_SIZES = (1, 2, 4, 8)
PIPELINE_SIZES = (1, 2, 4, 8, 16)
CONTEXT_SIZES = (1, 2, 4)
VIRTUAL_PIPELINE_SIZES = (None, 2, 4)
MICRO_BATCH_SIZES = (1, 2, 4)

WORLDS = tuple(8 << i for i in range(9))
"""8 to 2,048 GPUs."""

HEADS = "tp does not divide heads, query groups, ffn or vocabulary"
DIVIDES = "number of GPUs is not a multiple of tp x pp x cp"
DEPTH = "more pipeline stages than layers"
SEQUENCE = "sequence length is not a multiple of 2 cp x tp"
FP8_SIZES = "FP8 needs multiples of 16 on each rank"
ENGINE = "cuda_graphs or tp_comm_overlap do not support the layout or placement"
BATCH = "global batch is not a multiple of microbatch x dp (x pp with vpp)"
MEMORY = "needs more memory than the GPU has"


@dataclass(frozen=True)
class LayoutSearch:
    """Result of trying all layouts."""

    possible: list[Estimate]
    """Layouts that fit, fastest first."""
    impossible: Counter[str]
    """Reason -> number of layouts."""
    least_bytes: float | None
    """Bytes per GPU of the layout that needs the least memory, even if it does not fit. None if no
    layout divides.
    """


def layout_problem(case: PlanningCase, times: Times) -> str | None:
    """Return why the recipe's layout is impossible, without regard to memory; None if possible."""
    return _sizes_problem(case, times) or _batch_problem(case)


def _sizes_problem(case: PlanningCase, times: Times) -> str | None:
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


def _batch_problem(case: PlanningCase) -> str | None:
    p = case.recipe.parallel
    d = case.recipe.distill
    unit = d.micro_batch_size * (case.student_ranks // p.model_ranks) * p.interleaved
    return BATCH if d.global_batch_size % unit else None


def fits(estimate: Estimate, times: Times) -> bool:
    """Return whether the fullest GPU has enough memory."""
    return estimate.needed_bytes <= times.hardware.usable_gib * GIB


def search_layouts(case: PlanningCase, times: Times) -> LayoutSearch:
    """Try tp, pp, cp, vpp, microbatch and recomputation, with a colocated and with a remote
    teacher.

    All other settings are the recipe's. Co-students are ignored, because each student is planned
    separately.
    """
    divisible, impossible = _divisible_layouts(case, times)
    possible = [estimate for estimate in divisible if fits(estimate, times)]
    impossible[MEMORY] += len(divisible) - len(possible)
    least_bytes = min((estimate.needed_bytes for estimate in divisible), default=None)
    return LayoutSearch(possible, +impossible, least_bytes)


def fastest_layout(case: PlanningCase, times: Times) -> Estimate | None:
    """Return the first layout of search_layouts(); None if nothing fits."""
    divisible, _ = _divisible_layouts(case, times)
    return next((estimate for estimate in divisible if fits(estimate, times)), None)


def _divisible_layouts(case: PlanningCase, times: Times) -> tuple[list[Estimate], Counter[str]]:
    """Return (layouts that divide, fastest first; reason -> number of other layouts).

    Memory is not checked.
    """
    recipe = case.recipe
    estimates: list[Estimate] = []
    impossible = Counter[str]()
    trainings = [
        recipe.distill.model_copy(update={"micro_batch_size": size, "recompute": recompute})
        for size, recompute in itertools.product(MICRO_BATCH_SIZES, (False, True))
        if not (recompute and recipe.distill.cuda_graphs)
    ]
    for layout, teacher in itertools.product(_layouts(case.world), _teachers(case, times)):
        variant = case.with_recipe(recipe.model_copy(update={"parallel": layout, "teacher": teacher}))
        problem = _sizes_problem(variant, times)
        if problem:
            impossible[problem] += len(trainings)
            continue
        for training in trainings:
            candidate = variant.with_recipe(variant.recipe.model_copy(update={"distill": training}))
            problem = _batch_problem(candidate)
            if problem:
                impossible[problem] += 1
            else:
                estimates.append(estimate_distillation(candidate, times))
    estimates.sort(key=lambda estimate: estimate.step_s)
    return estimates, impossible


def _layouts(world: int) -> list[ParallelConfig]:
    """Return the layouts of the student to try on `world` GPUs."""
    sizes = itertools.product(TENSOR_SIZES, PIPELINE_SIZES, CONTEXT_SIZES, VIRTUAL_PIPELINE_SIZES)
    return [
        ParallelConfig(tp=tp, pp=pp, cp=cp, vpp=vpp, sequence_parallel=tp > 1)
        for tp, pp, cp, vpp in sizes
        if tp * pp * cp <= world and not (vpp and pp == 1)
    ]


def _teachers(case: PlanningCase, times: Times) -> list[TeacherConfig]:
    """Return placements of the teacher to try: colocated, and remote on several numbers of GPUs."""
    recipe = case.recipe
    colocated = recipe.teacher.model_copy(
        update={
            "placement": "colocated",
            "payload": "hidden",
            "ranks": None,
            "student_ranks": None,
            "parallel": ParallelConfig(),
            "siblings": {},
        }
    )
    if recipe.correct and recipe.corrects_during_distillation:
        return [colocated]
    return [colocated, *_remote_teachers(case, times)]


def _remote_teachers(case: PlanningCase, times: Times) -> Iterator[TeacherConfig]:
    """Yield remote teachers with the smallest tp that fits, on at most half of the GPUs.

    From four nodes on they use full nodes. In large jobs their size is a multiple of 1/32 of the
    world, rounded down to full nodes.
    """
    t = case.recipe.teacher
    remote = t.model_copy(
        update={
            "placement": "remote",
            "student_ranks": None,
            "siblings": {},
            "payload": t.payload if t.is_remote else "hidden",
        }
    )
    for tp in TENSOR_SIZES:
        layout = ParallelConfig(tp=tp, sequence_parallel=tp > 1)
        teacher = remote.model_copy(update={"parallel": layout})
        variant: Recipe = case.recipe.model_copy(update={"teacher": teacher})
        needed = sum(remote_teacher_memory(case.teacher, variant, 0).values())
        if layout_problems(case.teacher, tp) or needed > times.hardware.usable_gib * GIB:
            continue
        node = times.hardware.gpus_per_node
        unit = max(node, case.world // 32 // node * node) if case.world >= 4 * node else tp
        for ranks in range(unit, case.world // 2 + 1, unit):
            yield teacher.model_copy(update={"ranks": ranks})
        return


def smallest_world(case: PlanningCase, times: Times) -> int | None:
    """Return the smallest power of two of GPUs above the case's world on which a layout fits.

    None if there is none up to 8,192.
    """
    world = 1
    while world <= 8192:
        if world > case.world and fastest_layout(case.with_world(world), times):
            return world
        world *= 2
    return None


def scaling(case: PlanningCase, times: Times) -> list[tuple[int, Estimate | None]]:
    """Return (GPUs, fastest layout, or None if nothing fits) for 8 to 2,048 GPUs."""
    return [(world, fastest_layout(case.with_world(world), times)) for world in WORLDS]
