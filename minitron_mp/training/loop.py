"""The training loop, for distillation and for teacher correction.

With a teacher it is distillation. Without a teacher, and with ce_weight, it is fine-tuning on text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from minitron_mp.artifacts.manifest import Validation
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.console import say
from minitron_mp.distillation.teacher import Teacher, with_signals
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.preemption import Preempted
from minitron_mp.models.precision import communication_buffers, release_cuda_graphs
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.training.options import RunOptions
from minitron_mp.training.profiling import Profiler
from minitron_mp.training.run import TrainingRun
from minitron_mp.training.step_log import Diverged


def train_one(
    model: ShardedModel,
    teacher: Teacher | None,
    batches_of: Callable[[int], Sequence[Batch]],
    settings: DistillConfig | CorrectionConfig,
    options: RunOptions,
    *,
    stop_after: int | None = None,
    profile_folder: Path | None = None,
) -> Validation | None:
    """Train the model in place to settings.steps. Resume from its newest checkpoint, if any.

    Return the validation of the last step, or None if it was not validated.
    Reached by all ranks. batches_of(step): returns this data-parallel rank's microbatches of a
    step (from 0). stop_after: return after this number of steps of this call, and write a
    checkpoint. profile_folder: folder for the traces of settings.profile. InputError when gradients
    or losses are not finite in too many steps. Preempted when the job must stop, after a checkpoint
    is written.
    """
    run: TrainingRun | None = None
    try:
        with communication_buffers(settings, model):
            run = TrainingRun(model, teacher, settings, options)
            profiler = (
                Profiler(settings.profile, model.world, profile_folder, options.manifest.stage)
                if settings.profile and profile_folder
                else None
            )
            last = min(settings.steps, run.steps_done + (stop_after or settings.steps))
            train_together([run], teacher, batches_of, last, profiler=profiler)
            return run.validation
    except BaseException:
        if run is not None and run.checkpoints is not None:
            run.checkpoints.abandon()
        raise
    finally:  # also if TrainingRun() fails, because build_model() has set Megatron's stream
        if settings.cuda_graphs:
            release_cuda_graphs(model.chunks)


def train_together(
    runs: Sequence[TrainingRun],
    teacher: Teacher | None,
    batches_of: Callable[[int], Sequence[Batch]],
    last: int,
    *,
    drop_diverged: bool = False,
    profiler: Profiler | None = None,
) -> None:
    """Train all runs to step `last` with one forward pass of the teacher, and finalize them.

    A run that resumes at a later step waits for the other runs. drop_diverged: a run with too
    many steps without an update ends, and the other runs continue. Preempted when the job must
    stop. Reached by all ranks.
    """
    active = list(runs)
    stop_request = ""
    for run in active:
        run.step_log.start_clock()
    first = min(run.steps_done for run in runs)
    early_stop = _early_stop(active)
    for step in range(first, first if early_stop else last):
        is_last = step + 1 == last
        if profiler:
            profiler.before(step)
        batches = with_signals(teacher, batches_of(step), step)
        for run in [run for run in active if run.steps_done == step]:
            try:
                take_step(run, batches, is_last=is_last)
            except Diverged:
                if not drop_diverged:
                    raise
                run.steps_done = step
                active.remove(run)
        if not is_last:
            stop_request = _agree_to_stop(active, teacher, step + 1)
        early_stop = "" if is_last else _early_stop(active)
        if profiler:
            profiler.after(step, is_last=is_last or bool(stop_request or early_stop))
        if stop_request or early_stop or not active:
            break
    if early_stop:
        stop_request = ""
        say(f"{runs[0].options.manifest.stage}: early stop after step {runs[0].steps_done}: {early_stop}")
    if stop_request:
        for run in active:
            run.save(wait=True)
    for run in runs:
        run.log()
        run.finalize()
    if stop_request:
        raise Preempted(
            f"{runs[0].options.manifest.stage}: stopped after step {step + 1} ({stop_request}); "
            "checkpoint saved"
        )


def _early_stop(runs: Sequence[TrainingRun]) -> str:
    """Return the reason of an early stop of a run, "" without one; equal on all ranks."""
    return next((run.early_stop for run in runs if run.early_stop), "")


def take_step(run: TrainingRun, batches: Sequence[Batch], *, is_last: bool = False) -> None:
    """Run one optimizer step. Log and save if an interval ends, or if is_last is set."""
    run.seed_step()
    run.forward_backward(batches)
    run.update()
    run.validate()
    save = is_last or run.save_is_due
    if save or run.log_is_due:
        run.log()
    if save or run.time_a_checkpoint:
        run.save(keep=save)


def _agree_to_stop(runs: Sequence[TrainingRun], teacher: Teacher | None, step: int) -> str:
    """Return the reason to stop after this step, or "" to continue.

    The result is empty on all ranks or on no rank. A remote teacher chooses the step, because it
    runs ahead (distillation/stream_end.py).
    """
    request = next((run.stop_request for run in runs if run.stop_request), "")
    stream_end = teacher.stream_end if teacher is not None else None
    if stream_end is None or not runs:
        return request
    if request and runs[0].world.is_main and stream_end.last_step() is None:
        stream_end.request(request)
    return stream_end.reason() if stream_end.last_step() == step else ""
