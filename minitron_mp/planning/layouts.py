"""All layouts of a recipe on so many GPUs: which are possible and why others are not, the fastest first, and the same from 8 to 2,048 GPUs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.models.arch import Arch, fp8_problems, layout_problems
from minitron_mp.planning.hardware import Times
from minitron_mp.planning.memory import fp8_of, remote_teacher_memory
from minitron_mp.planning.step_time import Estimate, estimate_distillation

GIB = 2**30

TENSOR, PIPELINE, CONTEXT, CHUNKS, MICRO = (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4), (None, 2, 4), (1, 2, 4)

WORLDS = tuple(8 << i for i in range(9))
"""8 to 2,048."""

HEADS, DIVIDES, DEPTH, SEQUENCE, EIGHT, ENGINE, BATCH, MEMORY = (
    "tp does not divide heads, groups, ffn or vocabulary",
    "GPUs are no multiple of tp x pp x cp",
    "more pipeline stages than layers",
    "sequence is no multiple of 2 cp x tp",
    "FP8 needs multiples of 16 on each rank",
    "cuda_graphs or tp_comm_overlap do not go with the layout or placement",
    "global batch is no multiple of micro batch x dp (x pp with vpp)",
    "more memory than the GPU has",
)


@dataclass(frozen=True)
class LayoutSearch:
    """found: possible layouts, fastest first. impossible: reason -> how many of those tried."""

    found: list[Estimate]
    impossible: Counter[str]
    least_bytes: float | None
    """Of a GPU, in the most frugal layout that divides, whether it fits or not."""


def layout_problem(student: Arch, teacher: Arch, recipe: Recipe, world: int, times: Times) -> str | None:
    """Why this layout is impossible, memory apart."""
    return _sizes_problem(student, teacher, recipe, world, times) or _batch_problem(recipe, world)


def _sizes_problem(student: Arch, teacher: Arch, recipe: Recipe, world: int, times: Times) -> str | None:
    p, t = recipe.parallel, recipe.teacher
    teachers, students = t.ranks_in(world), _students(recipe, world)
    here = [student] if t.is_remote else [student, teacher]
    if (
        students < p.model_ranks
        or students % p.model_ranks
        or (t.is_remote and (teachers < 1 or teachers % t.parallel.model_ranks))
    ):
        return DIVIDES
    if p.tp > times.hardware.gpus_per_node or any(layout_problems(arch, p.tp) for arch in here):
        return HEADS
    if p.pp * (p.vpp or 1) > min(arch.num_layers for arch in here):
        return DEPTH
    if recipe.data.sequence_length % ((2 * p.cp if p.cp > 1 else 1) * (p.tp if p.sequence_parallel else 1)):
        return SEQUENCE
    for arch, kind, layout in (
        (student, fp8_of(recipe.distill), p),
        (teacher, fp8_of(t), t.parallel if t.is_remote else p),
    ):
        if kind and fp8_problems(arch, layout.tp, layout.tokens_of_sample(recipe.data.sequence_length)):
            return EIGHT
    return ENGINE if recipe.engine_problems() else None


def _batch_problem(recipe: Recipe, world: int) -> str | None:
    p, d = recipe.parallel, recipe.distill
    return (
        BATCH
        if d.global_batch_size
        % (d.micro_batch_size * (_students(recipe, world) // p.model_ranks) * p.interleaved)
        else None
    )


def _students(recipe: Recipe, world: int) -> int:
    return world - recipe.teacher.ranks_in(world) - sum(recipe.teacher.siblings.values())


def fits(estimate: Estimate, times: Times) -> bool:
    return estimate.needs_bytes <= (times.hardware.memory_gib - times.hardware.reserved_gib) * GIB


def search_layouts(student: Arch, teacher: Arch, recipe: Recipe, world: int, times: Times) -> LayoutSearch:
    """Try tensor, pipeline, context and virtual pipeline sizes, microbatches, recomputation; the teacher beside the student, and on GPUs of its own.

    Everything else is the recipe's. Siblings are left out: each student is planned by itself.
    """
    possible, impossible = _possible(student, teacher, recipe, world, times)
    found = [estimate for estimate in possible if fits(estimate, times)]
    impossible[MEMORY] += len(possible) - len(found)
    return LayoutSearch(
        found, +impossible, min((estimate.needs_bytes for estimate in possible), default=None)
    )


def fastest(student: Arch, teacher: Arch, recipe: Recipe, world: int, times: Times) -> Estimate | None:
    """The first of search(); None where nothing fits."""
    return next(
        (
            estimate
            for estimate in _possible(student, teacher, recipe, world, times)[0]
            if fits(estimate, times)
        ),
        None,
    )


def _possible(
    student: Arch, teacher: Arch, recipe: Recipe, world: int, times: Times
) -> tuple[list[Estimate], Counter[str]]:
    """(layouts that divide, fastest first, whether they fit or not; why the others do not)."""
    d, t, found, impossible = recipe.distill, recipe.teacher, [], Counter[str]()
    beside: dict[str, Any] = {
        "placement": "colocated",
        "payload": "hidden",
        "ranks": None,
        "student_ranks": None,
        "parallel": ParallelConfig(),
        "siblings": {},
    }
    placements = [t.model_copy(update=beside)]
    if not (recipe.correct and recipe.corrects_meanwhile):
        placements += _teachers(recipe, teacher, world, times)
    trainings = [
        d.model_copy(update={"micro_batch_size": m, "recompute": r})
        for m, r in itertools.product(MICRO, (False, True))
        if not (r and d.cuda_graphs)
    ]
    for tp, pp, cp, vpp, placement in itertools.product(TENSOR, PIPELINE, CONTEXT, CHUNKS, placements):
        if (vpp and pp == 1) or tp * pp * cp > world:
            continue
        layout = ParallelConfig(tp=tp, pp=pp, cp=cp, vpp=vpp, sequence_parallel=tp > 1)
        variant = recipe.model_copy(update={"parallel": layout, "teacher": placement})
        if why := _sizes_problem(student, teacher, variant, world, times):
            impossible[why] += len(trainings)
            continue
        for settings in trainings:
            chosen = variant.model_copy(update={"distill": settings})
            if why := _batch_problem(chosen, world):
                impossible[why] += 1
            else:
                found.append(estimate_distillation(student, teacher, chosen, world, times))
    found.sort(key=lambda estimate: estimate.step_s)
    return found, impossible


def _teachers(recipe: Recipe, teacher: Arch, world: int, times: Times) -> Iterator:
    """Remote teachers, at most half of all GPUs at the least tp that fits. From 32 GPUs on whole nodes, from 512 on thirty-seconds of the world."""
    t, room = recipe.teacher, (times.hardware.memory_gib - times.hardware.reserved_gib) * GIB
    remote = t.model_copy(
        update={
            "placement": "remote",
            "student_ranks": None,
            "siblings": {},
            "payload": t.payload if t.is_remote else "hidden",
        }
    )
    for tp in TENSOR:
        layout = ParallelConfig(tp=tp, sequence_parallel=tp > 1)
        chosen = remote.model_copy(update={"parallel": layout})
        held = remote_teacher_memory(teacher, recipe.model_copy(update={"teacher": chosen}), 0)
        if not layout_problems(teacher, tp) and sum(held.values()) <= room:
            node = times.hardware.gpus_per_node
            unit = max(node, world // 32 // node * node) if world >= 4 * node else tp
            for ranks in range(unit, world // 2 + 1, unit):
                yield chosen.model_copy(update={"ranks": ranks})
            return


def smallest_world(student: Arch, teacher: Arch, recipe: Recipe, times: Times, above: int) -> int | None:
    """The least power of two of GPUs beyond `above` on which some layout fits."""
    world = 1
    while world <= 8192:
        if world > above and fastest(student, teacher, recipe, world, times):
            return world
        world *= 2
    return None


def scaling(student: Arch, teacher: Arch, recipe: Recipe, times: Times) -> list[tuple[int, Estimate | None]]:
    """(GPUs, the fastest layout there, None where nothing fits) from 8 to 2,048 GPUs."""
    return [(world, fastest(student, teacher, recipe, world, times)) for world in WORLDS]
