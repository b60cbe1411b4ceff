"""The stages that train: correct and distill. Their curves, logs and checkpoints lie beside the artefacts until those are whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from minitron_mp import artifact, checkpoint, data, signals
from minitron_mp.arch import Arch
from minitron_mp.console import Tracker, say
from minitron_mp.correction import PREFIX, LearningTeacher
from minitron_mp.drift import tell_drift
from minitron_mp.job import Job, assets_from
from minitron_mp.leaving import Left
from minitron_mp.meter import Work, distillation_work, training_work
from minitron_mp.model import build_model, unwrap
from minitron_mp.parallel import World, on_main
from minitron_mp.precision import communication_buffers
from minitron_mp.schedule import Batch
from minitron_mp.trainer import Run, StepMetrics, metrics_line, resume_step, train
from minitron_mp.training_config import Training

METRICS = {"correct": "metrics_correct.jsonl", "distill": "metrics.jsonl"}
"""Beside the artefacts while a stage trains; a copy of the whole curve goes into the artefact that it made."""
CHECKPOINTS = "checkpoints"
"""Beside the artefacts while a stage trains, a folder for each."""
PROFILE = "profile"
"""Beside the artefacts: traces of steps, where a section `profile` asks for them."""


def correct(job: Job) -> None:
    """Train the teacher on the distillation text by cross-entropy (2408.11796, teacher correction)."""
    assert job.recipe.correct is not None
    _fit(job, "import", job.recipe.correct, lambda first, log: None)


def distill(job: Job) -> None:
    """Train the student on the teacher's distribution."""
    if job.world.role == "teacher":
        signals.teach(job)
    else:
        _fit(
            job,
            "prune",
            job.recipe.distill,
            lambda first, log: (
                _learning_teacher(job, log) if job.recipe.corrects_meanwhile else signals.source(job, first)
            ),
        )


def _learning_teacher(job: Job, log: Callable[[StepMetrics], None]) -> LearningTeacher:
    recipe, tutor = job.recipe, job.recipe.tutor
    assert recipe.correct is not None
    arch = job.arch(tutor)
    chunks = build_model(
        arch, job.world, training=recipe.correct, precision=recipe.teacher_precision, **job.build_options
    )
    checkpoint.load_model(chunks, job.paths[tutor], job.world)
    state: dict[str, Any] = {"checkpoints": None, "manifest": job.manifest}
    return LearningTeacher(
        Run(chunks, None, recipe.correct, job.world, vocab_size=arch.vocab_size, on_step=log, **state)
    )


def _fit(job: Job, start: str, settings: Training, teacher_from: Callable[[int, Callable], Any]) -> None:
    """Train the model that the stage `start` left; its metrics and TensorBoard come beside the artefact.

    teacher_from: (first step, what is called with the teacher's metrics, where it learns) -> the teacher, or None.
    """
    recipe, world, name = job.recipe, job.world, job.manifest.stage
    arch, place = (
        job.arch(start),
        {"dp_rank": job.world.groups.dp.rank(), "dp_size": job.world.groups.dp.size()},
    )
    train_set = signals.train_set(job, settings)
    sizes = {"global_batch_size": settings.global_batch_size, "micro_batch_size": settings.micro_batch_size}
    data.micro_batches(
        train_set, 0, **sizes, **place
    )  # refuse sizes that do not divide before any model is built

    def batches_of(step: int) -> Sequence[Batch]:
        return data.micro_batches(train_set, step, **sizes, **place)

    model = build_model(arch, world, training=settings, precision=recipe.precision, **job.build_options)
    checkpoint.load_model(model, job.paths[start], world)
    checkpoints = recipe.root / CHECKPOINTS / name
    first = resume_step(checkpoints, job.manifest, world)
    if first:
        say(f"{name}: going on from step {first}")
    curves = {
        which: recipe.root / METRICS[which]
        for which in (name, *["correct"] * (name == "distill" and recipe.corrects_meanwhile))
    }
    with Tracker(name, settings.steps, "steps", first) as tracker, ExitStack() as stack:
        logs = {which: stack.enter_context(_Log(path, which, first, world)) for which, path in curves.items()}

        def on_step(metrics: StepMetrics) -> None:
            logs[name](metrics)
            speed = f"{metrics.tokens_per_s:,.0f} tokens/s  {metrics.measured.line()}"
            tracker.advance(
                1, f"loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  grad norm {metrics.grad_norm:.2f}  {speed}"
            )

        teacher = teacher_from(first, logs.get("correct", on_step))
        tell_drift(job, getattr(teacher, "chunks", None))
        stack.enter_context(communication_buffers(settings, recipe, arch.hidden_size))
        companion = teacher if isinstance(teacher, LearningTeacher) else None
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
        except Left:
            if teacher is not None:
                teacher.close()
            raise
        if teacher is not None:
            teacher.close()
    state = checkpoint.model_state(model, world)
    if companion is not None:
        state["teacher"] = checkpoint.prefixed(
            checkpoint.model_state(list(map(unwrap, companion.chunks)), world), PREFIX
        )

    def add_files(folder: Path) -> None:
        assets_from(job.paths["import"])(folder)
        for path in curves.values():
            shutil.copy(path, folder / path.name)

    checkpoint.save(state, job.output, job.manifest.model_copy(update={"arch": arch}), add_files)
    on_main(lambda: artifact.discard_checkpoints(checkpoints, job.manifest))


def _work(job: Job, arch: Arch, settings: Training, teacher: Any) -> Work:
    """What a step computes, on which ranks."""
    recipe, tokens = job.recipe, settings.global_batch_size * job.recipe.data.sequence_length
    if teacher is None:
        return training_work(recipe, arch, job.world, tokens=tokens)
    return distillation_work(recipe, arch, job.arch(recipe.tutor), job.world, tokens=tokens)


class _Log:
    """metrics.jsonl and TensorBoard scalars, on rank 0; takes back what was logged after the step that a run resumes from."""

    def __init__(self, path: Path, name: str, first: int, world: World):
        self.path, self.name, self.first, self.enabled = path, name, first, world.is_main

    def __enter__(self) -> Callable[[StepMetrics], None]:
        if self.enabled:
            from torch.utils.tensorboard import SummaryWriter

            lines = (
                self.path.read_text().splitlines(keepends=True) if self.path.exists() and self.first else []
            )
            artifact.write_text(
                self.path,
                "".join(
                    line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= self.first
                ),
            )
            self.file = self.path.open("a", buffering=1)
            self.board = SummaryWriter(
                str(self.path.with_name("tensorboard") / self.name), purge_step=self.first + 1
            )
        return self._write

    def _write(self, metrics: StepMetrics) -> None:
        self.file.write(metrics_line(metrics) + "\n")
        for name, value in metrics.given().items():
            if name != "step":
                self.board.add_scalar(f"{self.name}/{name}", value, metrics.step)
        self.board.flush()  # or a kill takes up to two minutes of points, and a resumed run does not repeat those before its checkpoint

    def __exit__(self, *_: Any) -> None:
        if self.enabled:
            self.file.close()
            self.board.close()
