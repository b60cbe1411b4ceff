"""The stage evaluate: all models of a project on held-out text, in tasks, and by the clock."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from minitron_mp.artifacts.files import write_text
from minitron_mp.console import Tracker
from minitron_mp.distillation.teacher import ColocatedTeacher
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.evaluation.choice_tasks import score_task
from minitron_mp.evaluation.log_likelihood import num_groups
from minitron_mp.evaluation.prefill_speed import measure
from minitron_mp.evaluation.quality import compare
from minitron_mp.evaluation.task_files import read_task_file
from minitron_mp.workflow.context import StageContext

SPEED_SHARE, SPEED_S = 0.04, 2.0
"""Share of the time of evaluate, and at least so many seconds, after which the measurement of speed repeats nothing more."""


def evaluate_models(job: StageContext) -> None:
    """Held-out loss, perplexity and KL of teacher, the teacher before correction, pruned and distilled student, in one pass over the text.

    Then their scores in tasks, and their speed, which changes from run to run and so is no part of what the manifest says.
    """
    settings, start = job.recipe.evaluate, time.monotonic()
    teacher = job.teacher(corrected=True)
    left_by = {"uncorrected": "import"} if job.recipe.correct else {}
    if job.recipe.distillation_teacher != job.recipe.pruning_base:
        left_by["unpruned"] = job.recipe.pruning_base
    left_by |= {"pruned": "prune", "distilled": "distill"}
    models = {name: job.build(stage) for name, stage in left_by.items()}
    count, groups = job.groups("valid", settings.num_samples, settings.micro_batch_size, exact=False)
    vocab_size, every = job.arch("import").vocab_size, {"teacher": teacher.chunks, **models}
    with Tracker("evaluate", count, "batches") as tracker:
        quality = compare(
            models, teacher, groups, job.world, vocab_size=vocab_size, progress=lambda: tracker.advance(1)
        )
    tasks, texts = _judge_tasks(job, every), _judge_texts(job, teacher, models)
    shape = {
        "sequence_length": job.recipe.data.sequence_length,
        "micro_batch_size": settings.micro_batch_size,
        "vocab_size": vocab_size,
    }
    kinds = {name: (job.arch(stage), job.recipe.precision) for name, stage in left_by.items()}
    kinds = {"teacher": (job.arch(job.recipe.distillation_teacher), job.recipe.teacher_precision), **kinds}
    speed = measure(
        every, kinds, job.world, **shape, budget_s=max(SPEED_S, SPEED_SHARE * (time.monotonic() - start))
    )
    content = {
        "manifest": job.manifest.model_dump(mode="json"),
        **{name: q.model_dump() for name, q in quality.items()},
        "tasks": tasks,
    }
    content |= {"texts": texts, "speed": speed.model_dump()}
    on_rank_0(lambda: write_text(job.output, json.dumps(content, indent=1)))


def _judge_texts(
    job: StageContext, teacher: ColocatedTeacher, models: dict[str, list[Any]]
) -> dict[str, dict[str, Any]]:
    """Name of a further held-out text -> model -> its quality there."""
    settings, found = job.recipe.evaluate, {}
    for name in job.recipe.data.held_out:
        count, groups = job.groups(name, settings.num_samples, settings.micro_batch_size, exact=False)
        with Tracker(f"evaluate, {name}", count, "batches") as tracker:
            progress = partial(tracker.advance, 1)
            quality = compare(
                models,
                teacher,
                groups,
                job.world,
                vocab_size=job.arch("import").vocab_size,
                progress=progress,
            )
        found[name] = {model: q.model_dump() for model, q in quality.items()}
    return found


def _judge_tasks(job: StageContext, models: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Task -> model -> its result."""
    settings, found = job.recipe.evaluate, {}
    for task, path in settings.tasks.items():
        items, size = read_task_file(Path(path), settings.task_items), settings.micro_batch_size
        calls = num_groups(sum(len(item.options) for item in items), job.world, size) * len(models)
        place = {
            "sequence_length": job.recipe.data.sequence_length,
            "micro_batch_size": size,
            "vocab_size": job.arch(job.recipe.pruning_base).vocab_size,
        }
        with Tracker(task, calls, "batches") as tracker:
            results = score_task(
                models,
                items,
                job.tokenizer(),
                job.world,
                **place,
                progress=lambda tracker=tracker: tracker.advance(1),
            )
        found[task] = {name: result.model_dump() for name, result in results.items()}
    return found
