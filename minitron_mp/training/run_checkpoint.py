"""The training loop: Megatron's schedules, data parallel wrapper and optimizer around one loss.

With a teacher it is distillation; without one, and with ce_weight, plain fine-tuning. A step is a pure function of (weights,
optimizer state, step number): the batch and the random streams are derived from seed and step, so a checkpoint is model,
optimizer and step, and a resumed run repeats the unbroken one bitwise at the same layout.
"""

from __future__ import annotations

from pathlib import Path

from minitron_mp.artifacts.manifest import MANIFEST, Manifest, require_artifact
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.distributed.world import World
from minitron_mp.errors import refuse


def resume_step(folder: Path, manifest: Manifest, world: World) -> int:
    """Steps done in the newest whole checkpoint, 0 without one; reached by all ranks.

    InputError when the checkpoints there are another run's, naming the field that differs.
    """
    return on_rank_0(lambda: newest_checkpoint(folder, manifest))


def newest_checkpoint(folder: Path, manifest: Manifest) -> int:
    # A step without a manifest is none: the machine stopped before the disk had it.
    whole = [path for path in sorted(folder.glob("step_*")) if (path / MANIFEST).is_file()]
    if not whole:
        return 0
    found = require_artifact(whole[-1], manifest.stage)
    fields = found.differences(manifest)
    refuse(
        f"{folder} holds checkpoints of another run; move or delete it, or go back to these settings:", fields
    )
    return int(whole[-1].name.removeprefix("step_"))


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"
