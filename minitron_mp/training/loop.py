"""The training loop: Megatron's schedules, data parallel wrapper and optimizer around one loss.

With a teacher it is distillation; without one, and with ce_weight, plain fine-tuning. A step is a pure function of (weights,
optimizer state, step number): the batch and the random streams are derived from seed and step, so a checkpoint is model,
optimizer and step, and a resumed run repeats the unbroken one bitwise at the same layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.distillation.stream_end import StreamEnd
from minitron_mp.distillation.teacher import Teacher, with_signals
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.preemption import Preempted
from minitron_mp.distributed.world import World, seed_all
from minitron_mp.models.precision import forget_cuda_graphs
from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.profiling import Profiler
from minitron_mp.training.run import Diverged, TrainingRun
from minitron_mp.training.throughput import Work


def train(
    chunks: list[Any],
    teacher: Teacher | None,
    batches_of: Callable[[int], Sequence[Batch]],
    settings: DistillConfig | CorrectionConfig,
    world: World,
    *,
    vocab_size: int,
    seed: int,
    checkpoints: Path,
    manifest: Manifest,
    on_step: Callable[[StepMetrics], None] = lambda metrics: None,
    stop_after: int | None = None,
    companion: Any = None,
    work: Work | None = None,
    profile_folder: Path | None = None,
) -> None:
    """Train the chunks in place to settings.steps, from the newest checkpoint of this very run if there is one.

    batches_of(step): this data parallel rank's microbatches of a step (from 0). on_step runs on rank 0, each log_interval, for
    every step since. stop_after: return after so many steps of this call, checkpoint written. companion:
    what has a state of its own in the checkpoints, sharded() and fill() as Run has them. work: for the meter. profile_folder: for the traces of
    settings.profile. InputError when the loss is not finite; Left when world.preemption says so, checkpoint written. Reached by all ranks.
    """
    place = {"checkpoints": checkpoints, "manifest": manifest, "companion": companion}
    try:
        training = TrainingRun(
            chunks, teacher, settings, world, vocab_size=vocab_size, on_step=on_step, work=work, **place
        )
        profiler = (
            Profiler(settings.profile, world, profile_folder, manifest.stage)
            if settings.profile and profile_folder
            else None
        )
        last = min(settings.steps, training.done + (stop_after or settings.steps))
        try:
            train_together([training], teacher, batches_of, last, seed=seed, profiler=profiler)
        except Preempted:
            training.settle()
            raise
        training.settle()
    finally:  # a Run that cannot be made has recorded nothing, but building the model has set Megatron's stream
        if settings.cuda_graphs:
            forget_cuda_graphs(chunks)


def train_together(
    runs: Sequence[TrainingRun],
    teacher: Teacher | None,
    batches_of: Callable[[int], Sequence[Batch]],
    last: int,
    *,
    seed: int,
    go_on: bool = False,
    profiler: Profiler | None = None,
) -> None:
    """Take all runs to step `last`, with one forward pass of the teacher for all of them; a run that is ahead waits for the others.

    go_on: a run that diverges is left where it is, and does not stop the others. Left when the ranks have agreed to leave.
    """
    runs = list(runs)
    for training in runs:
        training.start_clock()
    for step in range(min(training.done for training in runs), last):
        if not runs:
            return
        if profiler:
            profiler.before(step)
        batches = with_signals(teacher, batches_of(step), step)
        for training in [one for one in runs if one.done == step]:
            if (
                not training.settings.cuda_graphs
            ):  # recorded layers hold on to their random streams, and draw nothing from them
                seed_all(seed + step)
            try:
                training.step(batches, is_last=step + 1 == last)
            except Diverged:
                if not go_on:
                    raise
                training.done = step
                runs.remove(training)
        stream_end = teacher.stream_end if teacher is not None else None
        why = _why_leave(runs, stream_end, step + 1) if step + 1 < last else ""
        if profiler:
            profiler.after(step, is_last=bool(why) or step + 1 == last)
        if why:
            for training in runs:
                training.save()
                training.finish_save()
            raise Preempted(f"{runs[0].manifest.stage}: left after step {step + 1}: {why}")


def _why_leave(runs: Sequence[TrainingRun], stream_end: StreamEnd | None, step: int) -> str:
    """Why all ranks leave after this step, "" when they go on; equal on all ranks, as far as its being empty."""
    why = next((training.leave for training in runs if training.leave), "")
    if stream_end is None or not runs:
        return why
    if why and runs[0].world.is_main and stream_end.last_step() is None:
        stream_end.request(why)
    return stream_end.reason() if stream_end.last_step() == step else ""
