"""The measurements of the stage evaluate: held-out text, tasks, and prefill speed of all models."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

from minitron_mp.artifacts.files import write_text
from minitron_mp.console import Tracker
from minitron_mp.distillation.teacher import ColocatedTeacher
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.evaluation.choice_tasks import score_task
from minitron_mp.evaluation.log_likelihood import num_groups
from minitron_mp.evaluation.prefill_speed import measure
from minitron_mp.evaluation.quality import Quality, compare
from minitron_mp.evaluation.task_files import read_task_file
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.workflow.context import StageContext

SPEED_SHARE = 0.04
"""Limit for repeated speed measurements, as a share of the stage's time so far."""

SPEED_S = 2.0
"""Limit for repeated speed measurements in seconds, if that is larger."""

Models = dict[str, ShardedModel]


def evaluate_models(context: StageContext) -> None:
    """Measure teacher, uncorrected and unpruned teacher, pruned and distilled student.

    Called on all ranks. All models read the held-out text in one pass. The speed changes from run
    to run, so the manifest does not include it.
    """
    settings, start = context.recipe.evaluate, time.monotonic()
    teacher = context.teacher(corrected=True)
    models = {name: context.build(stage) for name, stage in context.recipe.evaluated_models.items()}
    all_models = {"teacher": teacher.model, **models}
    quality = _quality(context, "valid", "evaluate", models, teacher)
    tasks = {
        task: _task_results(context, task, Path(path), all_models) for task, path in settings.tasks.items()
    }
    texts = {
        text: _dumped(_quality(context, text, f"evaluate, {text}", models, teacher))
        for text in context.recipe.data.held_out
    }
    budget_s = max(SPEED_S, SPEED_SHARE * (time.monotonic() - start))
    speed = measure(all_models, micro_batch_size=settings.micro_batch_size, budget_s=budget_s)
    content = {
        "manifest": context.manifest.model_dump(mode="json"),
        **_dumped(quality),
        "tasks": tasks,
        "texts": texts,
        "speed": speed.model_dump(),
    }
    on_rank_0(lambda: write_text(context.output, json.dumps(content, indent=1)))


def _quality(
    context: StageContext, text: str, title: str, models: Models, teacher: ColocatedTeacher
) -> dict[str, Quality]:
    """Return the quality of the models and the teacher on one held-out text."""
    settings = context.recipe.evaluate
    count, groups = context.groups(text, settings.num_samples, settings.micro_batch_size, exact=False)
    with Tracker(title, count, "batches") as tracker:
        return compare(models, teacher, groups, progress=partial(tracker.advance, 1))


def _dumped(quality: dict[str, Quality]) -> dict[str, object]:
    return {model: values.model_dump() for model, values in quality.items()}


def _task_results(context: StageContext, task: str, path: Path, models: Models) -> dict[str, object]:
    """Return the result of each model on one task."""
    settings = context.recipe.evaluate
    items = read_task_file(path, settings.task_items)
    num_options = sum(len(item.options) for item in items)
    num_batches = num_groups(num_options, context.world, settings.micro_batch_size) * len(models)
    with Tracker(task, num_batches, "batches") as tracker:
        results = score_task(
            models,
            items,
            context.tokenizer(),
            micro_batch_size=settings.micro_batch_size,
            progress=partial(tracker.advance, 1),
        )
    return {name: result.model_dump() for name, result in results.items()}
