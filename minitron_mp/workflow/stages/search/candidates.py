"""The search for the student's sizes: rank candidates by held-out loss, then distill the best ones.

    ranking                  loss of each masked candidate, one forward pass over the calibration text
    rounds of distillation   one forward pass of the teacher for all remaining students; half are kept
    search.json              every candidate with its measurements; `plan` uses the chosen one

A candidate is ranked by its last measurement, never by its size. Progress is saved beside search.json:
measured candidates are not measured again, and each student resumes from its checkpoint.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Sequence
from functools import partial

from minitron_mp.artifacts.checkpoint import load_weights, save_checkpoint
from minitron_mp.artifacts.files import read_json, write_text
from minitron_mp.artifacts.manifest import Manifest, find_manifest
from minitron_mp.config.pruning import SearchConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.console import Tracker, say, table
from minitron_mp.data.batches import microbatches
from minitron_mp.data.prefetch import Prefetch
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.errors import InputError, refuse
from minitron_mp.evaluation.prefill_speed import batch_of, timed
from minitron_mp.evaluation.quality import compare
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.pruning.candidates import (
    Candidate,
    Trained,
    candidate_name,
    candidate_target,
    inference_bytes,
    shown,
    training,
)
from minitron_mp.pruning.depth import DepthTrials
from minitron_mp.pruning.make_plan import make_plan
from minitron_mp.pruning.masks import masked
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.pruning.scores import Scores
from minitron_mp.pruning.search_space import survey_candidates
from minitron_mp.pruning.slicing import prune
from minitron_mp.training.loop import train_together
from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.options import RunOptions, ignore_metrics
from minitron_mp.training.run import TrainingRun
from minitron_mp.workflow.context import StageContext, training_samples
from minitron_mp.workflow.stages.search import PROGRESS

REPEATS = 3
"""Number of timed forward passes. The fastest time is used."""


def search_sizes(context: StageContext) -> None:
    """Measure the candidates of a recipe and choose one. Called on all ranks; rank 0 writes search.json."""
    settings = _settings(context.recipe)
    progress = _Progress(context)
    _measure_pruned(context, progress)
    remaining = _ranked(progress.candidates, 0)[: settings.finalists]
    for last_step in settings.rounds(len(remaining)):
        _distill(context, progress, remaining, last_step)
        remaining = _ranked(remaining, last_step)[: -(-len(remaining) // 2)]
    chosen = remaining[0]
    if not math.isfinite(chosen.loss):
        raise InputError(
            "no candidate of the search has a finite loss; lower distill.lr, or set precision: fp32, "
            f"then delete {progress.folder}"
        )
    chosen.chosen = True
    _show(progress.candidates)

    def finish() -> None:
        content = {
            "manifest": context.manifest.model_dump(mode="json"),
            "candidates": [candidate.model_dump() for candidate in progress.candidates],
        }
        write_text(context.output, json.dumps(content, indent=1))
        shutil.rmtree(progress.folder, ignore_errors=True)

    on_rank_0(finish)


def _settings(recipe: Recipe) -> SearchConfig:
    assert recipe.search is not None
    return recipe.search


def _ranked(candidates: Sequence[Candidate], step: int) -> list[Candidate]:
    """Return the candidates by their loss after `step` steps of distillation; equal losses by name."""
    return sorted(candidates, key=lambda candidate: (candidate.loss_after(step), candidate.name))


class _Progress:
    """The candidates with their measurements so far, equal on every rank. Rank 0 writes them to disk."""

    def __init__(self, context: StageContext):
        self.context = context
        self.file = context.recipe.root / PROGRESS
        self.folder = self.file.parent
        rows = on_rank_0(self._read)
        self.candidates = [Candidate.model_validate(row) for row in rows] if rows else self._start()

    def _read(self) -> list[dict[str, object]]:
        """Return the candidates of an interrupted search; InputError when its settings differ."""
        if not self.file.exists():
            return []
        content = read_json(self.file, "search")
        refuse(
            f"{self.folder} has an unfinished search with other settings; move or delete it, "
            "or restore these settings:",
            Manifest.model_validate(content["manifest"]).differences(self.context.manifest),
        )
        rows: list[dict[str, object]] = content["candidates"]
        num_measured = len([row for row in rows if row["pruned_loss"] is not None])
        say(f"search: resuming, {num_measured} candidates are measured")
        return rows

    def _start(self) -> list[Candidate]:
        """Return the candidates of the recipe; with a latency budget, those that are fast enough."""
        recipe = self.context.recipe
        settings = _settings(recipe)
        tokens = settings.context or recipe.data.sequence_length
        archs, left_out = survey_candidates(recipe, self.context.arch(recipe.pruning_base))
        if left_out:
            say(f"search: {left_out}")
        candidates = [
            Candidate(
                name=candidate_name(arch),
                arch=arch,
                parameters=arch.num_parameters(),
                memory_gib=inference_bytes(arch, recipe.precision, settings.batch_size, tokens) / 2**30,
            )
            for arch in archs
        ]
        return _of_latency(self.context, candidates) if settings.latency_ms else candidates

    def save(self) -> None:
        """Save the measurements and copy rank 0's to every rank. Called on all ranks.

        Sums that are reduced over other groups may differ in the last bit.
        """

        def write() -> list[dict[str, object]]:
            rows = [candidate.model_dump() for candidate in self.candidates]
            content = {"manifest": self.context.manifest.model_dump(mode="json"), "candidates": rows}
            write_text(self.file, json.dumps(content))
            return rows

        for candidate, row in zip(self.candidates, on_rank_0(write)):
            of_rank_0 = Candidate.model_validate(row)
            candidate.latency_s = of_rank_0.latency_s
            candidate.pruned_loss = of_rank_0.pruned_loss
            candidate.distilled = of_rank_0.distilled

    def plan(self, candidate: Candidate) -> PrunePlan:
        """Return the plan that prunes the teacher to a candidate."""
        recipe, paths = self.context.recipe, self.context.paths
        trials = DepthTrials.load(paths["depth"]) if "depth" in paths else None
        target = candidate_target(candidate.arch, recipe.target.align)
        return make_plan(
            Scores.load(paths["score"]),
            self.context.arch(recipe.pruning_base),
            target,
            recipe.parallel.tp,
            recipe.export.family,
            recipe.depth,
            trials,
        )


def _of_latency(context: StageContext, candidates: list[Candidate]) -> list[Candidate]:
    """Return the candidates whose forward pass time is inside the budget."""
    least, most = _settings(context.recipe).bounds
    times_ms: list[float] = []
    with Tracker("search, latency", len(candidates), "candidates") as tracker:
        for candidate in candidates:
            model = context.empty_model(candidate.arch, random_weights=True)
            candidate.latency_s = latency(model, context.recipe)
            times_ms.append(1000 * candidate.latency_s)
            tracker.advance(1, f"{candidate.name}: {times_ms[-1]:,.1f} ms")
    inside = [candidate for candidate, time_ms in zip(candidates, times_ms) if least <= time_ms <= most]
    if not inside:
        raise InputError(
            f"no candidate takes {least:,.4g} to {most:,.4g} ms, they take {min(times_ms):,.4g} to "
            f"{max(times_ms):,.4g}: change search.latency_ms, or list other sizes"
        )
    return inside


def latency(model: ShardedModel, recipe: Recipe) -> float:
    """Return the seconds of the fastest forward pass of the slowest rank; equal on every rank.

    A pass is search.batch_size sequences of search.context tokens.
    """
    settings = _settings(recipe)
    tokens = settings.context or recipe.data.sequence_length
    batch = batch_of(settings.batch_size, tokens, model.arch.vocab_size)
    batches = [batch] * model.world.parallel.interleaved
    model.eval()
    _warm_up, *times = [timed(model, batches) for _ in range(REPEATS + 1)]
    return min(times)


def _measure_pruned(context: StageContext, progress: _Progress) -> None:
    """Measure the loss of every candidate after pruning and before distillation, with masks."""
    todo = [candidate for candidate in progress.candidates if candidate.pruned_loss is None]
    if not todo:
        return
    model, groups = context.build(context.recipe.pruning_base), _held_out(context)
    with Tracker(
        "search, pruned", len(progress.candidates), "candidates", len(progress.candidates) - len(todo)
    ) as tracker:
        for candidate in todo:
            with masked(model, progress.plan(candidate)):
                candidate.pruned_loss = compare({"": model}, None, groups)[""].loss
            progress.save()
            tracker.advance(1, f"{candidate.name}: loss {candidate.pruned_loss:.4f}")


def _distill(
    context: StageContext, progress: _Progress, remaining: Sequence[Candidate], last_step: int
) -> None:
    """Distill the candidates up to `last_step` and measure those that were not measured there."""
    todo = [
        candidate
        for candidate in remaining
        if all(trained.steps != last_step for trained in candidate.distilled)
    ]
    size = _settings(context.recipe).together or len(remaining)
    groups = _held_out(context) if todo else []
    for first in range(0, len(todo), size):
        _distill_together(context, progress, todo[first : first + size], last_step, groups)


def _distill_together(
    context: StageContext,
    progress: _Progress,
    part: Sequence[Candidate],
    last_step: int,
    groups: list[list[Batch]],
) -> None:
    """Distill candidates from one forward pass of the teacher per microbatch, and measure them."""
    recipe, world = context.recipe, context.world
    settings, start = training(recipe), time.monotonic()
    for candidate in part:
        _slice(context, progress, candidate)
    teacher, train_set = context.teacher(fp8=recipe.teacher.fp8), training_samples(context, settings)
    runs: list[TrainingRun] = []
    models: dict[str, ShardedModel] = {}
    trackers: list[Tracker] = []  # one, as soon as the step is known from which the runs resume

    def on_step(metrics: StepMetrics) -> None:
        trackers[0].advance(1, f"{part[0].name}: loss {metrics.loss:.4f}")

    for candidate in part:
        folder = progress.folder / candidate.name
        model = context.empty_model(candidate.arch, training=settings)
        load_weights(model.chunks, folder / "student", world)
        manifest = context.manifest.model_copy(
            update={"settings": {**context.manifest.settings, "candidate": candidate.name}}
        )
        report = on_step if candidate is part[0] else ignore_metrics
        options = RunOptions(folder, manifest, seed=recipe.seed, on_step=report)
        runs.append(TrainingRun(model, teacher, settings, options))
        models[candidate.name] = model
    first = min(run.steps_done for run in runs)
    title = f"search, {len(runs)} students to step {last_step}"
    with Tracker(title, last_step, "steps", first) as tracker:
        trackers.append(tracker)
        batches_of = partial(
            microbatches,
            train_set,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.micro_batch_size,
            dp_rank=world.groups.dp.rank(),
            dp_size=world.groups.dp.size(),
        )
        with Prefetch(batches_of, last_step) as batches_ahead:
            train_together(runs, teacher, batches_ahead, last_step, drop_diverged=True)
    quality = compare(models, teacher, groups)
    for candidate, run in zip(part, runs):
        loss, kl = quality[candidate.name].loss, quality[candidate.name].kl
        # After a divergence no step has an update, and the last weights may have a finite loss.
        has_diverged = run.steps_done < last_step or run.num_skipped_in_a_row > 0
        if has_diverged or not math.isfinite(loss):
            loss = kl = math.inf
            say(f"search: {candidate.name} is dropped, its loss is not finite")
        seconds = (time.monotonic() - start) / len(part)
        candidate.distilled.append(Trained(steps=last_step, loss=loss, kl=kl, seconds=seconds))
    progress.save()
    # Wrappers and optimizers are in reference cycles and as large as the students.
    del teacher, runs, run, models, model
    gc.collect()


def _slice(context: StageContext, progress: _Progress, candidate: Candidate) -> None:
    """Write the pruned student of a candidate, unless this search has written it already."""
    folder = progress.folder / candidate.name / "student"
    manifest = context.manifest.model_copy(update={"arch": candidate.arch})

    def is_done() -> bool:
        # A kill while a finished search is deleted leaves students of that search.
        written = find_manifest(folder) if folder.is_dir() else None
        if written is None:
            return False
        return written.fingerprint == manifest.fingerprint and written.arch == candidate.arch

    if on_rank_0(is_done):
        return
    teacher = context.build(context.recipe.pruning_base)
    save_checkpoint(prune(teacher, progress.plan(candidate)), folder, manifest)


def _held_out(context: StageContext) -> list[list[Batch]]:
    """Return the calibration text on which candidates are ranked."""
    settings = _settings(context.recipe)
    _, groups = context.groups("calibration", settings.num_samples, settings.micro_batch_size, exact=False)
    return list(groups)


def _show(candidates: Sequence[Candidate]) -> None:
    table(
        "search: held-out losses after pruning and after distillation (steps); "
        "* on the Pareto front of parameters and loss",
        *shown(candidates),
    )
    say(f"search: {next(candidate.name for candidate in candidates if candidate.chosen)} is chosen")
