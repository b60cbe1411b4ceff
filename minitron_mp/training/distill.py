"""distill() and train(): training from Python, without a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.artifacts.run_folder import discard_checkpoints
from minitron_mp.artifacts.saved_model import fingerprints, save_model
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.distillation.teacher import Teacher
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.process_groups import host_group
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.distributed.world import World
from minitron_mp.errors import refuse
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
    Traces of settings.profile are in the folder `out` + "_profile". InputError when the batches do
    not have the sizes of the settings.
    """
    refuse("distill() cannot use these settings:", _validation_problems(settings))
    out = Path(out)
    checkpoints = out.with_name(f"{out.name}_checkpoints")
    manifest = _manifest("distill", student, teacher, settings, seed)
    options = RunOptions(checkpoints, manifest, seed=seed, on_step=on_step)
    batches_of = _with_checked_sizes(batches_of, settings, student.world)
    traces = out.with_name(f"{out.name}_profile")
    train_one(student, teacher, batches_of, settings, options, profile_folder=traces)
    teacher.close()
    save_model(student, out, made_from=_folders(student, teacher), settings=manifest.settings)
    on_rank_0(lambda: discard_checkpoints(checkpoints, manifest, settings.keep_every))


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
    Traces of settings.profile are in the folder `checkpoints` + "_profile". The caller closes the
    teacher. Save the trained model with save_model(). InputError for settings that need a teacher
    or a folder, and when the batches do not have the sizes of the settings.
    """
    _check_arguments(teacher, settings, checkpoints)
    manifest = _manifest("train", model, teacher, settings, seed)
    folder = None if checkpoints is None else Path(checkpoints)
    options = RunOptions(folder, manifest, seed=seed, on_step=on_step)
    batches_of = _with_checked_sizes(batches_of, settings, model.world)
    # Without checkpoints there is no folder, but kind nsys writes nothing.
    traces = Path("profile") if folder is None else folder.with_name(f"{folder.name}_profile")
    train_one(model, teacher, batches_of, settings, options, profile_folder=traces)


def _check_arguments(
    teacher: Teacher | None, settings: DistillConfig | CorrectionConfig, checkpoints: str | Path | None
) -> None:
    problems = _validation_problems(settings)
    if teacher is None and settings.kl_weight:
        problems.append(
            f"kl_weight is {settings.kl_weight:g} without a teacher; give a teacher, or settings for the "
            "text alone: CorrectionConfig, or DistillConfig with kl_weight=0 and ce_weight=1"
        )
    if checkpoints is None and settings.profile and settings.profile.kind == "torch":
        problems.append(
            "profile writes traces beside the checkpoints, and checkpoints is None; give a folder, or drop "
            "profile"
        )
    refuse("train() cannot use these arguments:", problems)


def _validation_problems(settings: DistillConfig | CorrectionConfig) -> list[str]:
    if not settings.valid_interval:
        return []
    return ["valid_interval needs the held-out text of a recipe; set 0, or run a recipe"]


def _with_checked_sizes(
    batches_of: Callable[[int], Sequence[Batch]], settings: DistillConfig | CorrectionConfig, world: World
) -> Callable[[int], Sequence[Batch]]:
    """Return batches_of with a check of the batch sizes in the first step that is trained."""
    is_checked = False

    def checked(step: int) -> Sequence[Batch]:
        nonlocal is_checked
        batches = batches_of(step)
        if not is_checked:
            _check_sizes([len(batch["tokens"]) for batch in batches], settings, world)
            is_checked = True
        return batches

    return checked


def _check_sizes(sizes: list[int], settings: DistillConfig | CorrectionConfig, world: World) -> None:
    """Raise InputError on all ranks if any rank has batches of other sizes than the settings.

    sizes: samples of each microbatch of a step on this rank. Reached by all ranks.
    """
    by_rank: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, sizes, group=host_group())
    dp = world.groups.dp.size()
    problems = []
    others = sorted({size for rank in by_rank for size in rank} - {settings.micro_batch_size})
    if others:
        problems.append(
            f"microbatches have {', '.join(map(str, others))} samples, micro_batch_size is "
            f"{settings.micro_batch_size}; change one of them"
        )
    totals = sorted({sum(rank) for rank in by_rank})
    if any(total * dp != settings.global_batch_size for total in totals):
        problems.append(
            f"data-parallel ranks have {', '.join(map(str, totals))} samples, global_batch_size is "
            f"{settings.global_batch_size} over {dp} ranks; change one of them"
        )
    refuse("batches_of() does not return the batches of the settings:", problems)


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
