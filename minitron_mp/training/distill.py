"""distill(): distillation from Python, with checkpoints and an artifact, without a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from minitron_mp.artifacts.manifest import Manifest, discard_checkpoints
from minitron_mp.artifacts.saved_model import fingerprints, save_model
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.distillation.teacher import Teacher
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.training.loop import train
from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.options import RunOptions, ignore_metrics


def distill(
    student: ShardedModel,
    teacher: Teacher,
    batches_of: Callable[[int], Sequence[Batch]],
    settings: DistillConfig,
    *,
    out: str | Path,
    seed: int = 1,
    on_step: Callable[[StepMetrics], None] = ignore_metrics,
) -> None:
    """Train the student on the teacher's distribution and write it to the folder `out`.

    Reached by all ranks.

    student: result of load_model(..., training=settings), trained in place. batches_of(step):
    returns this data-parallel rank's microbatches of a step (from 0). on_step: called on rank 0
    with the metrics of each step. Checkpoints are in the folder `out` + "_checkpoints" until the
    end. A stopped run resumes from them if it is started again with the same settings and seed.
    """
    out = Path(out)
    checkpoints = out.with_name(f"{out.name}_checkpoints")
    recorded = {**settings.result_settings(), "seed": seed}
    teacher_model = getattr(teacher, "model", None)
    folders = [model.folder for model in (student, teacher_model) if model is not None and model.folder]
    inputs = fingerprints(folders)  # checkpoints of another student or teacher are rejected
    manifest = Manifest(stage="distill", settings=recorded, inputs=inputs, arch=student.arch)
    options = RunOptions(checkpoints, manifest, seed=seed, on_step=on_step)
    train(student, teacher, batches_of, settings, options)
    teacher.close()
    save_model(student, out, made_from=folders, settings=recorded)
    on_rank_0(lambda: discard_checkpoints(checkpoints, manifest))
