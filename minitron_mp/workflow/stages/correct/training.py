"""The stages that train: correct and distill. Their curves, logs and checkpoints lie beside the artefacts until those are whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from minitron_mp.artifacts.checkpoint import load_model, model_state, prefixed, save_checkpoint
from minitron_mp.artifacts.manifest import discard_checkpoints
from minitron_mp.config.training import TrainingConfig
from minitron_mp.console import Tracker, say
from minitron_mp.data.batches import micro_batches
from minitron_mp.distillation.teacher import Teacher
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.preemption import Preempted
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import build_model, unwrap
from minitron_mp.models.precision import communication_buffers
from minitron_mp.training.loop import train
from minitron_mp.training.metrics import MetricsLog, StepMetrics
from minitron_mp.training.run_checkpoint import resume_step
from minitron_mp.training.teacher_correction import PREFIX, TrainableTeacher
from minitron_mp.training.throughput import Work, distillation_work, training_work
from minitron_mp.workflow.context import StageContext, copy_assets_from, training_samples
from minitron_mp.workflow.stage_files import checkpoint_folder
from minitron_mp.workflow.teacher_source import log_fp8_teacher_kl

METRICS = {"correct": "metrics_correct.jsonl", "distill": "metrics.jsonl"}
"""Beside the artefacts while a stage trains; a copy of the whole curve goes into the artefact that it made."""

PROFILE = "profile"
"""Beside the artefacts: traces of steps, where a section `profile` asks for them."""


def correct_teacher(job: StageContext) -> None:
    """Train the teacher on the distillation text by cross-entropy (2408.11796, teacher correction)."""
    assert job.recipe.correct is not None
    run_training(job, "import", job.recipe.correct, lambda first, log: None)


def run_training(
    job: StageContext,
    start: str,
    settings: TrainingConfig,
    teacher_from: Callable[[int, Callable], Teacher | None],
) -> None:
    """Train the model that the stage `start` left; its metrics and TensorBoard come beside the artefact.

    teacher_from: (first step, what is called with the teacher's metrics, where it learns) -> the teacher, or None.
    """
    recipe, world, name = job.recipe, job.world, job.manifest.stage
    arch, place = (
        job.arch(start),
        {"dp_rank": job.world.groups.dp.rank(), "dp_size": job.world.groups.dp.size()},
    )
    train_set = training_samples(job, settings)
    sizes = {"global_batch_size": settings.global_batch_size, "micro_batch_size": settings.micro_batch_size}
    micro_batches(train_set, 0, **sizes, **place)  # refuse sizes that do not divide before any model is built

    def batches_of(step: int) -> Sequence[Batch]:
        return micro_batches(train_set, step, **sizes, **place)

    model = build_model(arch, world, training=settings, precision=recipe.precision, **job.build_options)
    load_model(model, job.paths[start], world)
    checkpoints = checkpoint_folder(recipe, name)
    first = resume_step(checkpoints, job.manifest, world)
    if first:
        say(f"{name}: resuming from step {first}")
    curves = {
        which: recipe.root / METRICS[which]
        for which in (name, *["correct"] * (name == "distill" and recipe.corrects_during_distillation))
    }
    with Tracker(name, settings.steps, "steps", first) as tracker, ExitStack() as stack:
        logs = {
            which: stack.enter_context(MetricsLog(path, which, first, world))
            for which, path in curves.items()
        }

        def on_step(metrics: StepMetrics) -> None:
            logs[name](metrics)
            speed = f"{metrics.tokens_per_s:,.0f} tokens/s  {metrics.measured.line()}"
            tracker.advance(
                1, f"loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  grad norm {metrics.grad_norm:.2f}  {speed}"
            )

        teacher = teacher_from(first, logs.get("correct", on_step))
        log_fp8_teacher_kl(job, None if teacher is None else teacher.chunks)
        stack.enter_context(communication_buffers(settings, recipe, arch.hidden_size))
        companion = teacher if isinstance(teacher, TrainableTeacher) else None
        options: dict[str, Any] = {
            "vocab_size": arch.vocab_size,
            "seed": recipe.seed,
            "checkpoints": checkpoints,
            "manifest": job.manifest,
            "companion": companion,
        }
        options |= {"work": _work(job, arch, settings, teacher), "profile_folder": recipe.root / PROFILE}
        try:
            train(model, teacher, batches_of, settings, world, **options, on_step=on_step)
        except Preempted:
            if teacher is not None:
                teacher.close()
            raise
        if teacher is not None:
            teacher.close()
    state = model_state(model, world)
    if companion is not None:
        state["teacher"] = prefixed(model_state(list(map(unwrap, companion.chunks)), world), PREFIX)

    def add_files(folder: Path) -> None:
        copy_assets_from(job.paths["import"])(folder)
        for path in curves.values():
            shutil.copy(path, folder / path.name)

    save_checkpoint(state, job.output, job.manifest.model_copy(update={"arch": arch}), add_files)
    on_rank_0(lambda: discard_checkpoints(checkpoints, job.manifest))


def _work(job: StageContext, arch: Arch, settings: TrainingConfig, teacher: Teacher | None) -> Work:
    """What a step computes, on which ranks."""
    recipe, tokens = job.recipe, settings.global_batch_size * job.recipe.data.sequence_length
    if teacher is None:
        return training_work(recipe, arch, job.world, tokens=tokens)
    return distillation_work(recipe, arch, job.arch(recipe.distillation_teacher), job.world, tokens=tokens)
