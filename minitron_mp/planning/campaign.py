"""GPU-hours of a whole run: correction, scoring, distillation, and what interrupts them.

docs/planning.md has the formula of each row. Times of computation are corrected towards published
rates, as those of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minitron_mp.config.recipe import Recipe
from minitron_mp.config.training import CorrectionConfig, TrainingConfig
from minitron_mp.models.arch import Arch
from minitron_mp.planning.estimate import Estimate
from minitron_mp.planning.layouts import BATCH_DIVIDES
from minitron_mp.planning.memory import GIB, rank_parameters, training_peak
from minitron_mp.planning.model_pass import LOSS, ModelPass, stage_times
from minitron_mp.planning.step_time import estimate_training, pipeline_seconds
from minitron_mp.planning.times import Times
from minitron_mp.planning.variants import MICRO_BATCH_SIZES, dividing_batch

CHECKPOINT_BYTES = 14
"""Bytes per parameter of a checkpoint: weights in bf16, and three float32 tensors of Adam."""

LOSS_FORWARD = 0.5
"""Time of output layers and loss without their backward pass, as a share of both. Of four products
two are forward.
"""


@dataclass(frozen=True)
class CampaignItem:
    """One row of a campaign: its name, its GPU-hours, and the numbers behind them as text."""

    name: str
    gpu_hours: float
    detail: str


@dataclass(frozen=True)
class _Part:
    """The time that a part takes the whole job."""

    name: str
    seconds: float
    detail: str


@dataclass(frozen=True)
class _Run:
    """A training run of the campaign: its step, and what it saves."""

    arch: Arch
    training: TrainingConfig
    step_s: float

    @property
    def seconds(self) -> float:
        return self.step_s * self.training.steps


def campaign(estimate: Estimate, base: Arch, times: Times) -> list[CampaignItem]:
    """Return the GPU-hours of all that the recipe of an estimate runs on its GPUs.

    The GPUs of a remote teacher wait while the other stages run on the student's GPUs. base: the
    model that is pruned.
    """
    recipe, world, ranks = estimate.recipe, estimate.case.world, estimate.case.student_ranks
    distillation = _Run(estimate.case.student, recipe.distill, estimate.step_s)
    runs = [distillation]
    parts = []
    if recipe.pruning_base == "correct" and recipe.correct:
        step_s = correction_step_s(base, recipe.correct, recipe, ranks, times)
        correction = _Run(base, recipe.correct, step_s)
        runs.insert(0, correction)
        parts.append(_Part("teacher correction", correction.seconds, _steps_text(correction)))
    if recipe.prunes:
        parts.append(_scoring(base, recipe, ranks, times))
    if recipe.teacher.placement == "cached":
        parts.append(_caching(estimate, times))
    parts.append(_Part("distillation", distillation.seconds, _steps_text(distillation)))
    parts.append(_validation(estimate, times))
    parts.append(_evaluation(base, recipe, ranks, times))
    parts.append(_checkpoints(runs, estimate, times))
    parts.append(_reading(runs, recipe, ranks, times))
    parts.append(_restarts(runs, parts, world, times))
    return [CampaignItem(part.name, part.seconds * world / 3600, part.detail) for part in parts]


def total_gpu_hours(items: Sequence[CampaignItem]) -> float:
    return sum(item.gpu_hours for item in items)


def _steps_text(run: _Run) -> str:
    return f"{run.training.steps:,} steps of {run.step_s:.3f} s"


def correction_step_s(
    base: Arch, training: CorrectionConfig, recipe: Recipe, ranks: int, times: Times
) -> float:
    """Return the expected seconds of a step of teacher correction on all GPUs."""
    cost = estimate_training(base, training, recipe, ranks, times, None)
    return sum(cost.seconds.values()) * times.correction(training.fp8 or recipe.precision)


def correction_problem(
    base: Arch, training: CorrectionConfig, recipe: Recipe, ranks: int, times: Times
) -> str | None:
    """Return why teacher correction is impossible in the recipe's layout; None if it is possible."""
    p = recipe.parallel
    unit = training.micro_batch_size * (ranks // p.model_ranks) * p.interleaved
    if ranks % p.model_ranks or training.global_batch_size % unit:
        return f"{BATCH_DIVIDES} on {ranks} GPUs"
    needed = training_peak(base, training, recipe, ranks) / GIB
    if needed > times.hardware.usable_gib:
        return f"it needs {needed:.1f} GiB per GPU, {times.hardware.usable_gib:.1f} GiB are available"
    return None


def with_fitting_correction(estimate: Estimate, base: Arch, times: Times) -> Estimate | None:
    """Return the estimate with the fastest settings of correction that fit its layout.

    Microbatch, recomputation and, within the limits of variants.py, the batch are chosen. None if
    correction does not fit, or if the samples of `score` do not divide.
    """
    recipe, ranks = estimate.recipe, estimate.case.student_ranks
    score = recipe.score
    if recipe.prunes and score.num_samples % (
        score.micro_batch_size * (ranks // recipe.parallel.model_ranks)
    ):
        return None
    if recipe.correct is None or recipe.pruning_base != "correct":
        return estimate
    p = recipe.parallel
    found: list[tuple[float, CorrectionConfig]] = []
    for size in MICRO_BATCH_SIZES if ranks % p.model_ranks == 0 else ():
        training = dividing_batch(recipe.correct, size, ranks // p.model_ranks, p.interleaved)
        for recompute in (False, True) if training else ():
            assert training is not None
            tried = training.model_copy(update={"recompute": recompute})
            if not correction_problem(base, tried, recipe, ranks, times):
                step_s = correction_step_s(base, tried, recipe, ranks, times)
                found.append((step_s * tried.steps, tried))
                break
    if not found:
        return None
    _, best = min(found, key=lambda pair: pair[0])
    changed = recipe.model_copy(update={"correct": best})
    return Estimate(
        estimate.case.with_recipe(changed),
        estimate.seconds,
        estimate.traffic,
        estimate.basis,
        estimate.correction,
    )


def best_campaign(estimates: Sequence[Estimate], base: Arch, times: Times) -> Estimate | None:
    """Return the estimate whose whole run needs the fewest GPU-hours; None if no one can correct the
    teacher.
    """
    able = [with_fitting_correction(estimate, base, times) for estimate in estimates]
    return min(
        (estimate for estimate in able if estimate),
        key=lambda estimate: total_gpu_hours(campaign(estimate, base, times)),
        default=None,
    )


def _forward_s(arch: Arch, recipe: Recipe, micro_batches: int, size: int, times: Times) -> float:
    """Return the expected seconds of forward passes of a model in the student's layout."""
    work = ModelPass(arch, recipe.parallel, recipe.data.sequence_length, size, recipe.precision, train=False)
    parts = pipeline_seconds(stage_times(work, times).stages, micro_batches, recipe.parallel)
    return sum(parts.values()) * times.correction(recipe.precision)


def _scoring(base: Arch, recipe: Recipe, ranks: int, times: Times) -> _Part:
    score = recipe.score
    replicas = max(1, ranks // recipe.parallel.model_ranks)
    micro_batches = math.ceil(score.num_samples / score.micro_batch_size / replicas)
    seconds = _forward_s(base, recipe, micro_batches, score.micro_batch_size, times)
    return _Part("scoring", seconds, f"{score.num_samples:,} samples, forward")


def _caching(estimate: Estimate, times: Times) -> _Part:
    """Return the teacher's forward passes over all samples, before the distillation."""
    recipe, case = estimate.recipe, estimate.case
    step_s = _forward_s(case.teacher, recipe, case.microbatches, recipe.distill.micro_batch_size, times)
    seconds = step_s * recipe.distill.steps
    return _Part("caching the teacher", seconds, f"{recipe.distill.num_samples:,} samples, forward")


def _validation(estimate: Estimate, times: Times) -> _Part:
    """Return the validations during distillation: forward passes of student, teacher and loss."""
    recipe, case = estimate.recipe, estimate.case
    d = recipe.distill
    count = d.steps // d.valid_interval if d.valid_interval else 0
    size = d.micro_batch_size
    has_teacher = recipe.teacher.placement == "colocated"
    models = [case.student, case.teacher] if has_teacher else [case.student]
    forward_s = sum(_forward_s(arch, recipe, case.microbatches, size, times) for arch in models)
    loss_s = LOSS_FORWARD * estimate.seconds.get(LOSS, 0.0) * recipe.parallel.pp * estimate.correction
    seconds = count * d.valid_batches * (forward_s + loss_s)
    return _Part("validation", seconds, f"{count:,} x {d.valid_batches} batches")


def _evaluation(base: Arch, recipe: Recipe, ranks: int, times: Times) -> _Part:
    """Return the evaluation at the end. All models count as large as the unpruned one."""
    settings = recipe.evaluate
    replicas = max(1, ranks // recipe.parallel.model_ranks)
    micro_batches = math.ceil(settings.num_samples / settings.micro_batch_size / replicas)
    num_models = 1 + len(recipe.evaluated_models)
    seconds = num_models * _forward_s(base, recipe, micro_batches, settings.micro_batch_size, times)
    detail = f"{num_models} models, {settings.num_samples} samples; tasks are not counted"
    return _Part("evaluation", seconds, detail)


def save_seconds(arch: Arch, recipe: Recipe, ranks: int, times: Times) -> tuple[float, float]:
    """Return (seconds to join the optimizer's state and copy it to the host, seconds to write).

    All ranks write. Each tensor of the optimizer is summed onto its owner.
    """
    hardware, p = times.hardware, recipe.parallel
    largest = max(rank_parameters(arch, p))
    total = sum(rank_parameters(arch, p)) * p.tp
    group = max(1, ranks // (p.tp * p.pp))
    join = times.collective_s(12 * largest, group, p.tp)
    nodes = math.ceil(ranks / hardware.gpus_per_node)
    rate = 1e9 * min(hardware.disk_gb_s, nodes * hardware.disk_gb_s_node)
    return join, CHECKPOINT_BYTES * total / rate


def _checkpoints(runs: Sequence[_Run], estimate: Estimate, times: Times) -> _Part:
    """Return the time in which training waits for checkpoints. async_save hides the writing."""
    recipe, case = estimate.recipe, estimate.case
    seconds = 0.0
    texts = []
    for run in runs:
        join_s, write_s = save_seconds(run.arch, recipe, case.student_ranks, times)
        interval_s = run.step_s * run.training.checkpoint_interval
        exposed_s = max(0.0, write_s - interval_s) if run.training.async_save else write_s
        count = math.ceil(run.training.steps / run.training.checkpoint_interval)
        seconds += count * (join_s + exposed_s)
        best = best_interval_s(join_s + exposed_s, case.world, times) / run.step_s
        texts.append(f"{count:,} x {join_s + exposed_s:.1f} s (best interval: {best:,.0f} steps)")
    return _Part("checkpoints", seconds, " + ".join(texts))


def best_interval_s(save_s: float, world: int, times: Times) -> float:
    """Return the time between checkpoints that loses least: sqrt(2 x save time x MTBF of the job)."""
    return math.sqrt(2 * save_s * 3600 * times.hardware.mtbf_gpu_hours / world)


def _reading(runs: Sequence[_Run], recipe: Recipe, ranks: int, times: Times) -> _Part:
    """Return the waits for text. The next step's samples are read while a step computes."""
    waits = [max(0.0, _read_s(run, recipe, ranks, times) - run.step_s) for run in runs]
    seconds = sum(wait_s * run.training.steps for wait_s, run in zip(waits, runs))
    read_s = max(_read_s(run, recipe, ranks, times) for run in runs)
    return _Part("reading text", seconds, f"{read_s:.2f} s per step, read ahead while a step computes")


def _read_s(run: _Run, recipe: Recipe, ranks: int, times: Times) -> float:
    replicas = max(1, ranks // recipe.parallel.model_ranks)
    samples = run.training.global_batch_size / replicas
    return samples * times.hardware.read_ms_per_sample / 1e3


def _restarts(runs: Sequence[_Run], parts: Sequence[_Part], world: int, times: Times) -> _Part:
    """Return the first start, and the failures: half an interval of lost work and a restart each."""
    hardware = times.hardware
    failures = sum(part.seconds for part in parts) * world / 3600 / hardware.mtbf_gpu_hours
    training_s = sum(run.seconds for run in runs)
    lost_s = sum(run.seconds / training_s * run.training.checkpoint_interval * run.step_s / 2 for run in runs)
    start_s = 60 * hardware.restart_minutes
    seconds = start_s + failures * (start_s + lost_s)
    detail = f"{failures:.2f} failures, {lost_s / 60:.1f} min lost and {hardware.restart_minutes:g} min each"
    return _Part("start and failures", seconds, detail)
