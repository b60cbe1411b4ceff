"""distill() and train(): training from Python, without a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from minitron_mp.artifacts.manifest import Manifest, discard_checkpoints
from minitron_mp.artifacts.saved_model import fingerprints, save_model
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.distillation.teacher import Teacher
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.training.loop import train_one
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
    manifest = _manifest("distill", student, teacher, settings, seed)
    options = RunOptions(checkpoints, manifest, seed=seed, on_step=on_step)
    train_one(student, teacher, batches_of, settings, options)
    teacher.close()
    save_model(student, out, made_from=_folders(student, teacher), settings=manifest.settings)
    on_rank_0(lambda: discard_checkpoints(checkpoints, manifest))


def train(
    model: ShardedModel,
    teacher: Teacher | None,
    batches_of: Callable[[int], Sequence[Batch]],
    settings: DistillConfig | CorrectionConfig,
    *,
    checkpoints: str | Path | None = None,
    seed: int = 1,
    on_step: Callable[[StepMetrics], None] = ignore_metrics,
) -> None:
    """Train the model in place, and write no artifact.

    With a teacher this is distillation, but distill() also saves the student. Without a teacher the
    model is trained on the text by cross-entropy: teacher correction, with CorrectionConfig.

    Reached by all ranks. model, batches_of, on_step: those of distill(). checkpoints: folder of the
    checkpoints from which a stopped run resumes. They are kept at the end. None: no checkpoints.
    The caller closes the teacher. Save the trained model with save_model().
    """
    manifest = _manifest("train", model, teacher, settings, seed)
    folder = None if checkpoints is None else Path(checkpoints)
    options = RunOptions(folder, manifest, seed=seed, on_step=on_step)
    train_one(model, teacher, batches_of, settings, options)


def _manifest(
    stage: str,
    model: ShardedModel,
    teacher: Teacher | None,
    settings: DistillConfig | CorrectionConfig,
    seed: int,
) -> Manifest:
    """Return the manifest of a run, by which checkpoints of another run are rejected."""
    recorded = {**settings.result_settings(), "seed": seed}
    inputs = fingerprints(_folders(model, teacher))
    return Manifest(stage=stage, settings=recorded, inputs=inputs, arch=model.arch)


def _folders(model: ShardedModel, teacher: Teacher | None) -> list[Path]:
    """Return the artifact folders that the model and the teacher were loaded from."""
    models = (model, None if teacher is None else teacher.model)
    return [one.folder for one in models if one is not None and one.folder is not None]
