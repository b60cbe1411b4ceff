"""The training of the stages correct and distill.

Metrics, TensorBoard files and checkpoints are written beside the artifact until it is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from minitron_mp.artifacts.checkpoint import model_state, prefixed, save_checkpoint
from minitron_mp.artifacts.curves import Curve
from minitron_mp.artifacts.hf_folder import copy_assets_from
from minitron_mp.artifacts.manifest import Validation
from minitron_mp.artifacts.run_folder import discard_checkpoints
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.console import Tracker, say
from minitron_mp.data.batches import epochs_in_order, microbatches
from minitron_mp.data.positions import sample_positions
from minitron_mp.data.prefetch import Prefetch
from minitron_mp.distillation.teacher import ColocatedTeacher, RemoteTeacher, Teacher
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.preemption import Preempted
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.errors import InputError
from minitron_mp.evaluation.quality import Quality, compare
from minitron_mp.models.arch import Arch
from minitron_mp.models.sharded_model import ShardedModel, unwrap
from minitron_mp.training.experiment_trackers import ExperimentLog, TrackedTraining
from minitron_mp.training.loop import train_one
from minitron_mp.training.metrics import MetricsLog, StepMetrics
from minitron_mp.training.options import RunOptions
from minitron_mp.training.run_checkpoint import ResumePoint, resume_point
from minitron_mp.training.teacher_correction import PREFIX, TrainableTeacher
from minitron_mp.training.throughput import StepWork, distillation_work, training_work
from minitron_mp.training.validation import Measure
from minitron_mp.workflow.context import StageContext, corpus, training_samples
from minitron_mp.workflow.held_out_signals import HeldOutText
from minitron_mp.workflow.stage_files import checkpoint_folder

PROFILE = "profile"
"""Folder beside the artifacts with the traces of a section `profile`."""

OnStep = Callable[[StepMetrics], None]

TeacherFactory = Callable[[ResumePoint, OnStep], Teacher]
"""(start of the run, callback for the metrics of a trained teacher) -> teacher."""


def run_training(
    context: StageContext,
    start: str,
    settings: DistillConfig | CorrectionConfig,
    curves: Sequence[Curve],
    make_teacher: TeacherFactory | None = None,
) -> None:
    """Train the model that the stage `start` wrote, and write the artifact.

    Called on all ranks. curves: that of the model last, before it that of a teacher that is trained
    at the same time. make_teacher: None for training without a teacher.
    """
    recipe, name = context.recipe, context.manifest.stage
    checkpoints = checkpoint_folder(recipe, name)
    resumed = resume_point(checkpoints, context.manifest, context.accept)
    first_step, context = resumed.step, replace(context, manifest=resumed.manifest)
    _check_resume(resumed, settings)
    batches_of = _batches_of(context, settings)
    batches_of(first_step)  # InputError for sizes that do not divide, before a model is built
    model = context.build(start, training=settings)
    if first_step:
        say(f"{name}: resuming from step {first_step}")
    for change in resumed.manifest.changes:
        if change.step == first_step:
            say(f"{name}: {change.name} changes from {change.old} to {change.new} after step {change.step}")
    if first_step and _order_changes(context, settings, first_step):
        say(
            f"{name}: these changes change the epochs of the text, so the order of its samples changes: some "
            "text is read again, and some is left out (docs/changing_a_run.md)"
        )
    files = [recipe.root / curve.file for curve in curves]
    with Tracker(name, settings.steps, "steps", first_step) as tracker, ExitStack() as stack:
        logs = [_metrics_log(stack, context, curve, path, first_step) for curve, path in zip(curves, files)]

        def on_step(metrics: StepMetrics) -> None:
            logs[-1](metrics)
            tracker.advance(1, metrics.console_line())

        # The first log is that of a trained teacher. Other teachers have no metrics.
        teacher = make_teacher(resumed, logs[0]) if make_teacher else None
        options = RunOptions(
            checkpoints,
            context.manifest.model_copy(update={"arch": model.arch}),
            seed=recipe.seed,
            on_step=on_step,
            extra_state=teacher if isinstance(teacher, TrainableTeacher) else None,
            work=_work(context, model.arch, settings, teacher),
            measure=_measure(context, settings, teacher) if settings.valid_interval else None,
        )
        batches_ahead = stack.enter_context(Prefetch(batches_of, settings.steps))
        traces = recipe.root / PROFILE
        try:
            validation = train_one(model, teacher, batches_ahead, settings, options, profile_folder=traces)
        except Preempted:
            _close(teacher)
            raise
        _close(teacher)
    _write_artifact(context, model, teacher, files, validation)
    on_rank_0(lambda: discard_checkpoints(checkpoints, context.manifest, settings.keep_every, validation))


def _metrics_log(
    stack: ExitStack, context: StageContext, curve: Curve, path: Path, first_step: int
) -> OnStep:
    """Open the metrics file, TensorBoard and the experiment trackers of a curve on rank 0."""
    recipe = context.recipe
    write = stack.enter_context(MetricsLog(path, curve.name, first_step, context.world))
    if not recipe.log.trackers or not context.world.is_main:
        return write
    training = TrackedTraining(
        root=recipe.root,
        section=curve.name,
        name=recipe.command(f"{recipe.log.name or recipe.run.root.absolute().name} {curve.name}"),
        projects={key: getattr(recipe.log, key) for key in recipe.log.trackers},
        identity=context.manifest.at_step(0).fingerprint,  # --accept does not change it
        settings=recipe.model_dump(mode="json"),
    )
    send = stack.enter_context(ExperimentLog(training))

    def on_step(metrics: StepMetrics) -> None:
        write(metrics)
        send(metrics)

    return on_step


def _measure(
    context: StageContext, settings: DistillConfig | CorrectionConfig, teacher: Teacher | None
) -> Measure:
    """Return the function that measures a model on the held-out text.

    The KL needs the signals of a frozen teacher for this text. A cache does not hold them.
    """
    text, dp = HeldOutText.open(context, settings), context.world.groups.dp
    batches = [text.batches(number, dp.rank(), dp.size()) for number in range(settings.valid_batches)]
    frozen: Teacher | None = teacher if isinstance(teacher, ColocatedTeacher) else None
    if isinstance(teacher, RemoteTeacher):
        frozen = teacher.held_out

    def measure(model: ShardedModel) -> Quality:
        return compare({"model": model}, frozen, batches, measure_teacher=False)["model"]

    return measure


def _check_resume(resumed: ResumePoint, settings: DistillConfig | CorrectionConfig) -> None:
    """Raise InputError if accepted settings do not fit the steps that are already trained."""
    if settings.steps <= resumed.step:
        raise InputError(
            f"steps {settings.steps} must be above the step {resumed.step} from which the run resumes; raise "
            "it, or go back with --from-step"
        )
    skipped = [change for change in resumed.manifest.changes if change.name == "skip_batches"]
    for change in skipped:
        before = settings.model_copy(update={"skip_batches": change.old or []})
        done = sample_positions(before, ()).batch(change.step - 1) + 1
        old, new = ({tuple(pair) for pair in ranges or []} for ranges in (change.old, change.new))
        changed = [pair for pair in sorted(old ^ new) if pair[0] <= done]
        if changed:
            raise InputError(
                f"skip_batches {change.new} changes the batches {list(changed[0])}, and the run has read "
                f"{done} batches; give later batches, or go back with --from-step"
            )


def _order_changes(context: StageContext, settings: DistillConfig | CorrectionConfig, step: int) -> bool:
    """Return whether settings that change after this step also change the order of all samples."""
    names = ("steps", "global_batch_size", "skip_batches")
    changes = context.manifest.changes
    now = {change.name: change for change in changes if change.step == step and change.name in names}
    if not now:
        return False
    defaults = type(settings).model_fields
    old = {
        name: defaults[name].get_default() if change.old is None else change.old
        for name, change in now.items()
    }
    before = settings.model_copy(update=old)
    earlier = [change for change in changes if change.step < step]
    text = corpus(context)
    old_order, order = (
        epochs_in_order(text, "train", sample_positions(each, history).num_samples(each.steps))
        for each, history in ((before, earlier), (settings, changes))
    )
    return old_order != order


def _batches_of(
    context: StageContext, settings: DistillConfig | CorrectionConfig
) -> Callable[[int], Sequence[Batch]]:
    """Return the function from step to this data-parallel rank's microbatches."""
    positions = sample_positions(settings, context.manifest.changes)
    samples = training_samples(context, settings, positions)
    dp = context.world.groups.dp

    def batches_of(step: int) -> Sequence[Batch]:
        return microbatches(
            positions.from_step(samples, step),
            step,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.micro_batch_size,
            dp_rank=dp.rank(),
            dp_size=dp.size(),
        )

    return batches_of


def _close(teacher: Teacher | None) -> None:
    if teacher is not None:
        teacher.close()


def _write_artifact(
    context: StageContext,
    model: ShardedModel,
    teacher: Teacher | None,
    metrics_files: Sequence[Path],
    validation: Validation | None,
) -> None:
    """Write the trained model, the teacher if it was trained too, metrics and assets."""
    state = model_state(model.chunks, context.world)
    if isinstance(teacher, TrainableTeacher):
        chunks = [unwrap(chunk) for chunk in teacher.model.chunks]
        state["teacher"] = prefixed(model_state(chunks, context.world), PREFIX)

    def add_files(folder: Path) -> None:
        copy_assets_from(context.paths["import"])(folder)
        for path in metrics_files:
            shutil.copy(path, folder / path.name)

    manifest = context.manifest.model_copy(update={"arch": model.arch, "validation": validation})
    save_checkpoint(state, context.output, manifest, add_files)


def _work(
    context: StageContext, arch: Arch, settings: DistillConfig | CorrectionConfig, teacher: Teacher | None
) -> StepWork:
    """Return the computation of a step, for the throughput metrics."""
    recipe, tokens = context.recipe, settings.global_batch_size * context.recipe.data.sequence_length
    if teacher is None:
        return training_work(recipe, arch, context.world, tokens=tokens)
    return distillation_work(
        recipe, arch, context.arch(recipe.distillation_teacher), context.world, tokens=tokens
    )
