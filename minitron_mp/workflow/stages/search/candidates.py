"""The search for the student's sizes: candidates ranked by held-out loss after pruning, the best ones after short distillation.

    score ranks the candidates   masks (masks.py), one forward pass over the held-out text each
    rounds of distillation       the students that are left, all from one forward pass of the teacher; the better half stays
    search.json                  every candidate with what was measured; `plan` cuts the one that is chosen

A candidate is ranked by the last thing measured of it, never by its size. Progress lies beside search.json: candidates that are judged
are not judged again, and each student of a round goes on from its own checkpoint.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from minitron_mp.artifacts.checkpoint import load_weights, save_checkpoint
from minitron_mp.artifacts.files import read_json, write_text
from minitron_mp.artifacts.manifest import Manifest, find_manifest
from minitron_mp.config.recipe import Recipe
from minitron_mp.console import Tracker, say, table
from minitron_mp.data.batches import micro_batches
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
from minitron_mp.pruning.masks import masked
from minitron_mp.pruning.plan import PrunePlan, make_plan
from minitron_mp.pruning.scores import Scores
from minitron_mp.pruning.search_space import survey_candidates
from minitron_mp.pruning.slicing import prune
from minitron_mp.training.loop import train_together
from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.options import RunOptions, ignore_metrics
from minitron_mp.training.run import TrainingRun
from minitron_mp.workflow.context import StageContext, training_samples

WORK = "search"
"""Folder beside the artefacts while the search goes on."""

REPEATS = 3


def search_sizes(job: StageContext) -> None:
    """Measure the candidates of a recipe and choose one; reached by all ranks, rank 0 writes search.json."""
    progress = _Progress(job)
    _judge_pruned(job, progress)
    alive = sorted(progress.candidates, key=lambda c: (c.loss_after(0), c.name))[
        : job.recipe.search.finalists
    ]
    for last in job.recipe.search.rounds(len(alive)):
        _distill(job, progress, alive, last)
        alive = sorted(alive, key=lambda c, steps=last: (c.loss_after(steps), c.name))[: -(-len(alive) // 2)]
    if not math.isfinite(alive[0].loss):
        raise InputError(
            f"no candidate of the search has a loss that is a number: lower distill.lr, or set precision: fp32; then delete {progress.folder}"
        )
    alive[0].chosen = True
    _show(progress.candidates)

    def finish() -> None:
        content = {
            "manifest": job.manifest.model_dump(mode="json"),
            "candidates": [c.model_dump() for c in progress.candidates],
        }
        write_text(job.output, json.dumps(content, indent=1))
        shutil.rmtree(progress.folder, ignore_errors=True)

    on_rank_0(finish)


class _Progress:
    """The candidates with what is known of them so far, equal on every rank; rank 0 keeps them on disk."""

    def __init__(self, job: StageContext):
        self.job, self.folder = job, job.recipe.root / WORK
        self.file = self.folder / "progress.json"
        rows = on_rank_0(self._read)
        self.candidates = [Candidate.model_validate(row) for row in rows] if rows else self._start()

    def _read(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        content = read_json(self.file, "search")
        fields = Manifest.model_validate(content["manifest"]).differences(self.job.manifest)
        refuse(
            f"{self.folder} holds an unfinished search of another kind; move or delete it, or go back to these settings:",
            fields,
        )
        say(
            f"search: going on, {sum(row['pruned_loss'] is not None for row in content['candidates'])} candidates are judged"
        )
        return content["candidates"]

    def _start(self) -> list[Candidate]:
        recipe = self.job.recipe
        s, context = recipe.search, recipe.search.context or recipe.data.sequence_length
        found = []
        archs, left_out = survey_candidates(recipe, self.job.arch(recipe.pruning_base))
        if left_out:
            say(f"search: {left_out}")
        for arch in archs:
            memory = inference_bytes(arch, recipe.precision, s.batch_size, context) / 2**30
            found.append(
                Candidate(
                    name=candidate_name(arch), arch=arch, parameters=arch.num_parameters(), memory_gib=memory
                )
            )
        return _of_latency(self.job, found) if s.latency_ms else found

    def keep(self) -> None:
        """Rank 0's numbers, on disk and on every rank: sums of ranks that reduce over other groups may differ in the last bit. Reached by all ranks."""

        def write() -> list[dict[str, Any]]:
            rows = [c.model_dump() for c in self.candidates]
            write_text(
                self.file,
                json.dumps({"manifest": self.job.manifest.model_dump(mode="json"), "candidates": rows}),
            )
            return rows

        for candidate, row in zip(self.candidates, on_rank_0(write)):
            same = Candidate.model_validate(row)
            candidate.latency_s, candidate.pruned_loss, candidate.distilled = (
                same.latency_s,
                same.pruned_loss,
                same.distilled,
            )

    def plan(self, candidate: Candidate) -> PrunePlan:
        recipe, paths = self.job.recipe, self.job.paths
        trials = DepthTrials.load(paths["depth"]) if "depth" in paths else None
        target = candidate_target(candidate.arch, recipe.target.align)
        return make_plan(
            Scores.load(paths["score"]),
            self.job.arch(recipe.pruning_base),
            target,
            recipe.parallel.tp,
            recipe.export.family,
            recipe.depth,
            trials,
        )


def _of_latency(job: StageContext, found: list[Candidate]) -> list[Candidate]:
    """Those whose forward pass takes as long as the budget says."""
    least, most = job.recipe.search.bounds
    with Tracker("search, latency", len(found), "candidates") as tracker:
        for candidate in found:
            candidate.latency_s = latency(job.empty_model(candidate.arch, random_weights=True), job.recipe)
            tracker.advance(1, f"{candidate.name}: {1000 * candidate.latency_s:,.1f} ms")
    inside = [c for c in found if least <= 1000 * c.latency_s <= most]
    if not inside:
        times = [1000 * c.latency_s for c in found]
        raise InputError(
            f"no candidate takes {least:,.4g} to {most:,.4g} ms, they take {min(times):,.4g} to {max(times):,.4g}: "
            "change search.latency_ms, or list other sizes"
        )
    return inside


def latency(model: ShardedModel, recipe: Recipe) -> float:
    """Seconds of a forward pass of search.batch_size sequences of search.context tokens, the least of some, the slowest rank's; equal on every rank."""
    s = recipe.search
    assert s is not None
    batches = [
        batch_of(s.batch_size, s.context or recipe.data.sequence_length, model.arch.vocab_size)
    ] * model.world.parallel.interleaved
    model.eval()
    return min([timed(model, batches) for _ in range(REPEATS + 1)][1:])  # the first one warms up


def _judge_pruned(job: StageContext, progress: _Progress) -> None:
    """Held-out loss of every candidate right after pruning, by masks."""
    todo = [c for c in progress.candidates if c.pruned_loss is None]
    if not todo:
        return
    model, groups = job.build(job.recipe.pruning_base), _held_out(job)
    with Tracker(
        "search, pruned", len(progress.candidates), "candidates", len(progress.candidates) - len(todo)
    ) as tracker:
        for candidate in todo:
            with masked(model, progress.plan(candidate)):
                candidate.pruned_loss = compare({"": model}, None, groups)[""].loss
            progress.keep()
            tracker.advance(1, f"{candidate.name}: loss {candidate.pruned_loss:.4f}")


def _distill(job: StageContext, progress: _Progress, alive: Sequence[Candidate], last: int) -> None:
    """Take the candidates that have not been there to step `last`, and judge them."""
    todo = [c for c in alive if not any(row.steps == last for row in c.distilled)]
    size = job.recipe.search.together or len(alive)
    groups = _held_out(job) if todo else []
    for first in range(0, len(todo), size):
        _distill_together(job, progress, todo[first : first + size], last, groups)


def _distill_together(
    job: StageContext, progress: _Progress, part: Sequence[Candidate], last: int, groups: list[list[Batch]]
) -> None:
    recipe, world = job.recipe, job.world
    settings, start = training(recipe), time.monotonic()
    for candidate in part:
        _slice(job, progress, candidate)
    teacher, train_set = job.teacher(fp8=recipe.teacher.fp8), training_samples(job, settings)
    runs, models = [], {}
    trackers: list[Tracker] = []  # one, as soon as the step is known from which the runs resume

    def on_step(metrics: StepMetrics) -> None:
        trackers[0].advance(1, f"{part[0].name}: loss {metrics.loss:.4f}")

    for candidate in part:
        folder = progress.folder / candidate.name
        model = job.empty_model(candidate.arch, training=settings)
        load_weights(model.chunks, folder / "student", world)
        manifest = job.manifest.model_copy(
            update={"settings": {**job.manifest.settings, "candidate": candidate.name}}
        )
        report = on_step if candidate is part[0] else ignore_metrics
        options = RunOptions(folder, manifest, seed=recipe.seed, on_step=report)
        runs.append(TrainingRun(model, teacher, settings, options))
        models[candidate.name] = model
    first = min(run.steps_done for run in runs)
    with Tracker(f"search, {len(runs)} students to step {last}", last, "steps", first) as tracker:
        trackers.append(tracker)
        batches_of = partial(
            micro_batches,
            train_set,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.micro_batch_size,
            dp_rank=world.groups.dp.rank(),
            dp_size=world.groups.dp.size(),
        )
        train_together(runs, teacher, batches_of, last, drop_diverged=True)
    quality = compare(models, teacher, groups)
    for candidate, run in zip(part, runs):
        found = quality[candidate.name]
        finished = run.steps_done >= last and math.isfinite(found.loss)
        loss, kl = (found.loss, found.kl) if finished else (math.inf, math.inf)
        candidate.distilled.append(
            Trained(steps=last, loss=loss, kl=kl, seconds=(time.monotonic() - start) / len(part))
        )
        if loss == math.inf:
            say(f"search: the loss of {candidate.name} is no number, it is out")
    progress.keep()
    # Wrappers and optimizers are garbage in cycles, and as large as the students.
    del teacher, runs, run, models, model
    gc.collect()


def _slice(job: StageContext, progress: _Progress, candidate: Candidate) -> None:
    folder, manifest = (
        progress.folder / candidate.name / "student",
        job.manifest.model_copy(update={"arch": candidate.arch}),
    )

    def is_there() -> bool:  # and no other search's, of which a stop in the middle of tidying up left it
        found = find_manifest(folder) if folder.is_dir() else None
        return (
            found is not None and found.fingerprint == manifest.fingerprint and found.arch == candidate.arch
        )

    if on_rank_0(is_there):
        return
    teacher = job.build(job.recipe.pruning_base)
    save_checkpoint(prune(teacher, progress.plan(candidate)), folder, manifest)


def _held_out(job: StageContext) -> list[list[Batch]]:
    s = job.recipe.search
    return list(job.groups("calibration", s.num_samples, s.micro_batch_size, exact=False)[1])


def _show(found: Sequence[Candidate]) -> None:
    table(
        "search: held-out losses as cut and after distillation (steps); * on the Pareto front of parameters and loss",
        *shown(found),
    )
    say(f"search: {next(c.name for c in found if c.chosen)} is chosen")
