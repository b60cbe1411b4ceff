"""The checkpoints in the folder of a training run: the newest, the best, and those that stay."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from minitron_mp.artifacts.manifest import (
    CHECKPOINT_NAME,
    MANIFEST,
    TIMING,
    Manifest,
    Validation,
    user_files,
)

STEPS = "step_" + "[0-9]" * 8
"""Pattern of the names of the checkpoints of a training run."""

RETRAINING = ".retraining"
"""File in the folder of a training run: the run trains a finished stage again, with --force."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in the folder of a training run, in the order of their steps."""
    # A checkpoint without a manifest is incomplete, because the machine stopped while writing it.
    return sorted(path for path in folder.glob(STEPS) if (path / MANIFEST).is_file())


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in the folder of a training run; None without one."""
    return max(complete_checkpoints(folder), default=None)


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint."""
    return int(path.name.removeprefix("step_"))


def best_checkpoint(folder: Path, final: Validation | None = None) -> Path | None:
    """Return the checkpoint with the lowest loss on held-out text.

    None if no checkpoint was validated, or if the loss of the final model is at least as low.
    """
    losses = {}
    for path in complete_checkpoints(folder):
        validation = _manifest_of(path).validation
        if validation is not None and (final is None or validation.loss < final.loss):
            losses[path] = validation.loss
    return min(losses, key=losses.__getitem__, default=None)


def is_kept_step(step: int, keep_every: int) -> bool:
    """Return whether keep_every (0: none) keeps the checkpoint after a step."""
    return keep_every > 0 and step % keep_every == 0


def lasting_checkpoints(folder: Path, keep_every: int, final: Validation | None = None) -> list[Path]:
    """Return the best checkpoint and those of every keep_every steps (0: none).

    Checkpoints that an earlier start wrote with keep_every are among them. final: validation of the
    final model, None before the end.
    """
    steps = [
        path
        for path in complete_checkpoints(folder)
        if is_kept_step(checkpoint_step(path), keep_every) or _manifest_of(path).lasts
    ]
    best = best_checkpoint(folder, final)
    return steps if best is None else [*steps, best]


def discard_checkpoints(
    folder: Path, manifest: Manifest, keep_every: int = 0, final: Validation | None = None
) -> None:
    """Delete the checkpoints of a finished run and RETRAINING, and then the folder if it is empty.

    lasting_checkpoints(), checkpoints of other runs, checkpoints with files of the user in them, and
    other files are kept.
    """
    lasting = lasting_checkpoints(folder, keep_every, final)
    for path in folder.iterdir() if folder.is_dir() else []:
        if not CHECKPOINT_NAME.fullmatch(path.name) or path in lasting:
            continue
        is_complete = not path.name.startswith(".") and (path / MANIFEST).is_file()
        is_kept = is_complete and path.name != TIMING
        if not is_kept or (is_of_run(path, manifest) and not user_files(path)):
            shutil.rmtree(path, ignore_errors=True)
    (folder / RETRAINING).unlink(missing_ok=True)
    for empty in (folder, folder.parent):
        with suppress(OSError):  # the folder does not exist, or is not empty
            empty.rmdir()


def _manifest_of(checkpoint: Path) -> Manifest:
    return Manifest.model_validate_json((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def is_of_run(checkpoint: Path, manifest: Manifest) -> bool:
    """Return whether a checkpoint belongs to the run that wrote an artifact with this manifest."""
    step = checkpoint_step(checkpoint)
    return _manifest_of(checkpoint).fingerprint == manifest.at_step(step).fingerprint
