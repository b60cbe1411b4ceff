"""Search over the layouts of a recipe on a number of GPUs: which one is fastest.

The search has two passes. The first estimates the time of all sizes with even stages, and the
memory of the fastest ones: recomputation is tried where the memory requires it. The second refines
the fastest layouts that fit: uneven stages, recomputation of fewer layers, and CUDA graphs where
the GPU waits for the host. variants.py lists what is tried.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from minitron_mp.config.engine_rules import engine_problems
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.planning.case import PlanningCase
from minitron_mp.planning.estimate import Estimate
from minitron_mp.planning.layouts import BATCH, MEMORY, fits, sizes_problem
from minitron_mp.planning.model_pass import HOST
from minitron_mp.planning.step_time import estimate_distillation
from minitron_mp.planning.times import Times
from minitron_mp.planning.variants import (
    MICRO_BATCH_SIZES,
    dividing_batch,
    in_fp8,
    layouts,
    teachers,
    uneven_layouts,
    with_graphs,
    with_overlap,
)

WORLDS = tuple(8 << i for i in range(9))
"""8 to 2,048 GPUs."""

REFINED = 16
"""Number of layouts of the first pass that the second one refines."""

COLOCATED = 8
"""At least so many of them have a colocated teacher: a remote one waits while other stages run."""

HOST_SHARE = 0.01
"""Share of a step in which the GPU waits for the host, from which on CUDA graphs are tried."""


@dataclass(frozen=True)
class LayoutSearch:
    """Result of a search."""

    possible: list[Estimate]
    """The fastest layouts that fit, fastest first (GPU-hours for the recipe's tokens)."""
    num_tried: int
    """Number of layouts that divide."""
    impossible: Counter[str]
    """Reason -> number of layouts. Of the layouts that need too much memory, those are counted that
    are faster than the last possible one.
    """
    least_bytes: float | None
    """Bytes per GPU of the layout that needs the least memory, if nothing fits. None if no layout
    divides.
    """

    @property
    def remote(self) -> Estimate | None:
        """Return the fastest layout with a remote teacher."""
        return next((estimate for estimate in self.possible if estimate.case.teacher_ranks), None)


def search_layouts(case: PlanningCase, times: Times, *, fp8: bool = False) -> LayoutSearch:
    """Try the variants of variants.py, with a colocated and with a remote teacher.

    fp8: compute all linear layers in FP8. All other settings are the recipe's. Co-students are
    ignored, because each student is planned separately.
    """
    if fp8:
        case = case.with_recipe(in_fp8(case.recipe))
    impossible = Counter[str]()
    queue = _Queue(times)
    for candidate in _candidates(case, times, impossible):
        queue.add(candidate)
    num_tried = len(queue.heap)
    possible = queue.fitting(REFINED)
    if possible:
        num_remote = sum(1 for estimate in possible if estimate.case.teacher_ranks)
        num_colocated = len(possible) - num_remote
        possible += queue.fitting(COLOCATED - num_colocated, remote=False)
        possible += queue.fitting(1 - num_remote, remote=True)
    impossible[MEMORY] = queue.num_too_large
    possible += [better for estimate in possible for better in _refined(estimate, times)]
    possible.sort(key=_rank)
    return LayoutSearch(possible, num_tried, +impossible, queue.least_bytes)


class _Queue:
    """Layouts in the order of their speed. Only the memory of the fastest ones is estimated."""

    def __init__(self, times: Times):
        self.times = times
        self.heap: list[tuple[float, int, Estimate]] = []
        self.num_too_large = 0
        self.least_bytes: float | None = None
        self._number = itertools.count()

    def add(self, case: PlanningCase) -> None:
        estimate = estimate_distillation(case, self.times)
        heapq.heappush(self.heap, (_rank(estimate), next(self._number), estimate))

    def fitting(self, count: int, *, remote: bool | None = None) -> list[Estimate]:
        """Remove and return up to `count` of the fastest layouts that fit.

        A layout that does not fit is tried again with recomputation. remote: return only layouts
        with a remote teacher, or only those with a colocated one; the others stay.
        """
        found: list[Estimate] = []
        others = []
        while self.heap and len(found) < count:
            entry = heapq.heappop(self.heap)
            estimate = entry[-1]
            if remote is not None and remote != (estimate.case.teacher_ranks > 0):
                others.append(entry)
                continue
            if fits(estimate, self.times):
                found.append(estimate)
                continue
            self.least_bytes = min(self.least_bytes or math.inf, estimate.needed_bytes)
            distill = estimate.recipe.distill
            if distill.recompute or distill.cuda_graphs:
                self.num_too_large += 1
            else:
                self.add(_with_training(estimate.case, distill, recompute=True))
        self.heap = [*others, *self.heap]
        heapq.heapify(self.heap)
        return found


def _rank(estimate: Estimate) -> float:
    return estimate.step_s / estimate.tokens


def fastest_layout(case: PlanningCase, times: Times, *, fp8: bool = False) -> Estimate | None:
    """Return the first layout of search_layouts(); None if nothing fits."""
    possible = search_layouts(case, times, fp8=fp8).possible
    return possible[0] if possible else None


def _candidates(case: PlanningCase, times: Times, impossible: Counter[str]) -> Iterator[PlanningCase]:
    """Yield each layout that divides, without recomputation. Count the others by reason."""
    recipe = case.recipe
    for layout, teacher in itertools.product(layouts(case.world), teachers(case, times)):
        # _refined() tries CUDA graphs, which exclude some layouts.
        distill = recipe.distill.model_copy(update={"cuda_graphs": False})
        changes: dict[str, object] = {"parallel": layout, "teacher": teacher, "distill": distill}
        variant = case.with_recipe(with_overlap(recipe.model_copy(update=changes)))
        problem = sizes_problem(variant, times)
        if problem:
            impossible[problem] += len(MICRO_BATCH_SIZES)
            continue
        replicas = variant.student_ranks // layout.model_ranks
        for size in MICRO_BATCH_SIZES:
            training = dividing_batch(variant.recipe.distill, size, replicas, layout.interleaved)
            if training is None:
                impossible[BATCH] += 1
            else:
                yield _with_training(variant, training, recompute=False)


def _with_training(case: PlanningCase, training: TrainingConfig, *, recompute: bool | int) -> PlanningCase:
    """Return the case with other settings of `distill`.

    A teacher that is corrected during distillation has the same batches.
    """
    recipe = case.recipe
    changed = training.model_copy(update={"recompute": recompute})
    sections: dict[str, TrainingConfig] = {"distill": changed}
    if recipe.correct and recipe.corrects_during_distillation:
        names = ("micro_batch_size", "global_batch_size", "recompute")
        same = {name: getattr(changed, name) for name in names}
        steps = max(1, round(recipe.correct.steps * changed.steps / recipe.distill.steps))
        sections["correct"] = recipe.correct.model_copy(update=same | {"steps": steps})
    return case.with_recipe(recipe.model_copy(update=sections))


def _refined(estimate: Estimate, times: Times) -> Iterator[Estimate]:
    """Yield variants of an estimate that fit and are faster."""
    found = [estimate]
    for variant in _uneven(estimate):
        if not sizes_problem(variant, times):
            found.append(estimate_distillation(variant, times))
    best = min((each for each in found if fits(each, times)), key=_rank)
    further = [best]
    if best.recipe.distill.recompute is True:
        further += _partly_recomputed(best, times)
    if best.seconds.get(HOST, 0.0) > HOST_SHARE * best.arithmetic_s:
        graphs = best.case.with_recipe(with_graphs(best.recipe))
        if not engine_problems(graphs.recipe):
            further.append(estimate_distillation(graphs, times))
    fastest = min((each for each in further if fits(each, times)), key=_rank)
    if fastest is not estimate:
        yield fastest


def _uneven(estimate: Estimate) -> list[PlanningCase]:
    case = estimate.case
    stages = uneven_layouts(case.recipe.parallel, case.student.num_layers)
    return [_with_layout(case, layout) for layout in stages]


def _with_layout(case: PlanningCase, layout: ParallelConfig) -> PlanningCase:
    recipe: Recipe = case.recipe.model_copy(update={"parallel": layout})
    return case.with_recipe(recipe)


def _partly_recomputed(estimate: Estimate, times: Times) -> list[Estimate]:
    """Return the estimate that recomputes the fewest layers of a chunk and fits, if there is one."""
    case = estimate.case
    low, high = -1, max(case.recipe.parallel.layers_of_chunks(case.student.num_layers))
    while high - low > 1:  # low layers do not fit, high layers do
        middle = (low + high) // 2
        variant = _with_training(case, case.recipe.distill, recompute=middle)
        if fits(estimate_distillation(variant, times), times):
            high = middle
        else:
            low = middle
    return [estimate_distillation(_with_training(case, case.recipe.distill, recompute=high), times)]


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
