"""Variants of a recipe that the search tries: layouts, teachers, batches, stages and formats.

They change the speed and the memory of a run, not its result, except the FP8 variant and a batch
near the recipe's, which is tried only where the recipe's batch does not divide.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TypeVar

from minitron_mp.config.distillation import TeacherConfig
from minitron_mp.config.engine_rules import engine_problems
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.models.arch import layout_problems
from minitron_mp.models.flops import forward_flops, training_flops
from minitron_mp.planning.case import PlanningCase
from minitron_mp.planning.memory import GIB, remote_teacher_memory
from minitron_mp.planning.times import Times

TENSOR_SIZES = (1, 2, 4, 8)
PIPELINE_SIZES = (1, 2, 4, 8, 16)
CONTEXT_SIZES = (1, 2, 4)
VIRTUAL_PIPELINE_SIZES = (None, 2, 4)
MICRO_BATCH_SIZES = (1, 2, 4)

BATCH_RANGE = 0.1
"""Largest difference between a tried batch and the recipe's, as a share of the recipe's."""

TEACHER_RANGE = (0.6, 1.25)
"""Tried GPUs of a remote teacher, as multiples of its share of the work."""

FP8 = "tensorwise"
"""FP8 scaling of the variant in FP8: the one that all of its settings allow, see FP8Scaling."""

T = TypeVar("T", bound=TrainingConfig)


def layouts(world: int) -> list[ParallelConfig]:
    """Return the layouts of the student to try on `world` GPUs, with even stages."""
    sizes = itertools.product(TENSOR_SIZES, PIPELINE_SIZES, CONTEXT_SIZES, VIRTUAL_PIPELINE_SIZES)
    return [
        ParallelConfig(tp=tp, pp=pp, cp=cp, vpp=vpp, sequence_parallel=tp > 1)
        for tp, pp, cp, vpp in sizes
        if tp * pp * cp <= world and not (vpp and pp == 1)
    ]


def teachers(case: PlanningCase, times: Times) -> list[TeacherConfig]:
    """Return placements of the teacher to try: colocated, and remote on several numbers of GPUs."""
    recipe = case.recipe
    kept = {name: getattr(recipe.teacher, name) for name in ("model", "precision", "fp8")}
    colocated = TeacherConfig().model_copy(update=kept)  # the other keys are for remote teachers
    if recipe.correct and recipe.corrects_during_distillation:
        return [colocated]
    return [colocated, *_remote_teachers(case, times)]


def _teacher_share(case: PlanningCase, times: Times) -> float:
    """Return the teacher's share of the computation of a step."""
    recipe = case.recipe
    sequence_length = recipe.data.sequence_length
    teacher = forward_flops(case.teacher, sequence_length, head=False)
    teacher_s = teacher / times.rates["fp8" if recipe.teacher.fp8 else "bf16"]
    student = training_flops(case.student, sequence_length)
    student_s = student / times.rates["fp8" if recipe.distill.fp8 else "bf16"]
    return teacher_s / (teacher_s + student_s)


def _remote_teachers(case: PlanningCase, times: Times) -> Iterator[TeacherConfig]:
    """Yield remote teachers with the smallest tp that fits, on at most half of the GPUs.

    From four nodes on they use full nodes. In large jobs their size is a multiple of 1/32 of the
    world, rounded down to full nodes. Their share of the GPUs is near their share of the work,
    because the slower side sets the pace.
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
        balanced = case.world * _teacher_share(case, times)
        fewest, most = (factor * balanced for factor in TEACHER_RANGE)
        for ranks in range(unit, case.world // 2 + 1, unit):
            if fewest - unit <= ranks <= most + unit:
                yield teacher.model_copy(update={"ranks": ranks})
        return


def with_overlap(recipe: Recipe) -> Recipe:
    """Return a recipe whose training runs hide communication, as far as its layout allows it."""
    changed = _trained(recipe, {"overlap": True, "tp_comm_overlap": recipe.parallel.tp > 1})
    return _trained(changed, {"tp_comm_overlap": False}) if engine_problems(changed) else changed


def in_fp8(recipe: Recipe) -> Recipe:
    """Return a recipe that computes all linear layers in FP8: student, teacher and correction.

    Formats that the recipe sets stay.
    """
    distill = recipe.distill.model_copy(update={"fp8": recipe.distill.fp8 or FP8})
    changes: dict[str, object] = {"distill": distill}
    if recipe.correct:
        changes["correct"] = recipe.correct.model_copy(update={"fp8": recipe.correct.fp8 or FP8})
    if not (recipe.correct and recipe.corrects_during_distillation):
        changes["teacher"] = recipe.teacher.model_copy(update={"fp8": recipe.teacher.fp8 or FP8})
    return recipe.model_copy(update=changes)


def with_graphs(recipe: Recipe) -> Recipe:
    """Return a recipe that trains the student with CUDA graphs, without recomputation."""
    changes = {"cuda_graphs": True, "tp_comm_overlap": False, "recompute": False}
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update=changes)})


def _trained(recipe: Recipe, changes: dict[str, object]) -> Recipe:
    """Return a recipe with these settings in each training run."""
    sections: dict[str, object] = {"distill": recipe.distill.model_copy(update=changes)}
    if recipe.correct:
        sections["correct"] = recipe.correct.model_copy(update=changes)
    return recipe.model_copy(update=sections)


def dividing_batch(training: T, micro_batch_size: int, replicas: int, interleaved: int) -> T | None:
    """Return the training run with this microbatch and a batch that divides, or None.

    It is the recipe's batch if that divides, else the nearest one within BATCH_RANGE. The steps
    change with it, so that the run has the same number of tokens to within half a step.
    """
    unit = micro_batch_size * replicas * interleaved
    before = training.global_batch_size
    batch = unit * max(1, round(before / unit))
    if abs(batch - before) > BATCH_RANGE * before:
        return None
    steps = max(1, round(training.num_samples / batch))
    return training.model_copy(
        update={"micro_batch_size": micro_batch_size, "global_batch_size": batch, "steps": steps}
    )


def uneven_layouts(parallel: ParallelConfig, num_layers: int) -> list[ParallelConfig]:
    """Return the layout with up to three layers fewer on the last stage, which has both output
    layers.

    The layers go to the other stages in turn.
    """
    found = []
    even = ParallelConfig(pp=parallel.pp, vpp=parallel.vpp).layers_of_chunks(num_layers)
    counts = list(even)
    last_stage = range(len(counts) - 1, -1, -parallel.pp)
    others = [chunk for chunk in range(len(counts)) if chunk % parallel.pp != parallel.pp - 1]
    for number in range(3 if parallel.pp > 1 else 0):
        counts[last_stage[number % len(last_stage)]] -= 1
        counts[others[number % len(others)]] += 1
        if min(counts) < 1:
            break
        found.append(parallel.model_copy(update={"layers": tuple(counts)}))
    return found
