"""RunCheckpoints: save the checkpoints of a training run, and resume from the newest one."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from minitron_mp.artifacts.checkpoint import AsyncCheckpointWriter, load_checkpoint, save_checkpoint
from minitron_mp.artifacts.manifest import (
    MANIFEST,
    STEPS,
    Manifest,
    Validation,
    checkpoint_step,
    lasting_checkpoints,
    newest_checkpoint,
    require_artifact,
    user_files,
)
from minitron_mp.config.training import TrainingConfig
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError, refuse
from minitron_mp.training.options import RunOptions, Stateful


class RunCheckpoints:
    """The checkpoints of one training run in its folder.

    With settings.async_save forked processes write a checkpoint while the steps continue.
    saved_step: step of the newest checkpoint. All ranks must call the methods. The properties do
    not communicate.
    """

    def __init__(self, folder: Path, options: RunOptions, settings: TrainingConfig, world: World):
        self.folder, self.settings, self.world = folder, settings, world
        self.manifest, self.extra_state = options.manifest, options.extra_state
        self.writer = AsyncCheckpointWriter() if settings.async_save else None
        self.saved_step = 0
        self._blocked_s = 0.0
        self._save_started = 0.0

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was started and is not committed yet; equal on all ranks."""
        return self.writer is not None and self.writer.pending

    @property
    def writing(self) -> bool:
        """Whether this rank still writes its part of a checkpoint."""
        return self.writer is not None and self.writer.writing

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint interval ends after a step."""
        return step % self.settings.checkpoint_interval == 0

    def is_needed(self, step: int) -> bool:
        """Return whether a step needs a checkpoint: it is neither saved nor the last step."""
        return step != self.saved_step and step < self.settings.steps

    def take_blocked_s(self) -> float | None:
        """Return the seconds that checkpoints blocked training since the last call, or None."""
        seconds, self._blocked_s = self._blocked_s, 0.0
        return seconds or None

    def save(self, run: Stateful, step: int, validation: Validation | None = None) -> None:
        """Write a checkpoint of a run after a step. With async_save, start to write it.

        validation: of this step.
        """
        self.finish()
        start = time.perf_counter()
        state = run.state_dict()
        if self.extra_state is not None:
            state["extra_state"] = self.extra_state.state_dict()
        target = step_folder(self.folder, step)
        manifest = self.manifest.model_copy(update={"validation": validation})
        if self.writer is not None:
            self.writer.start(state, target, manifest, self._delete_old)
        else:
            save_checkpoint(state, target, manifest)
            on_rank_0(self._delete_old)
        self.saved_step, self._save_started = step, start
        seconds = time.perf_counter() - start
        self._blocked_s += seconds
        if self.writer is None:
            self._record_duration(seconds)

    def finish(self) -> None:
        """Wait for the pending asynchronous checkpoint, if any."""
        if self.writer is None or not self.writer.pending:
            return
        start = time.perf_counter()
        self.writer.finish()
        self._blocked_s += time.perf_counter() - start
        self._record_duration(time.perf_counter() - self._save_started)

    def abandon(self) -> None:
        """Stop writing the pending checkpoint after an error or an interrupt."""
        if self.writer is not None:
            self.writer.abandon()

    def resume(self, run: Stateful) -> int:
        """Load the newest complete checkpoint of this run. Return its step, 0 without one."""
        step = resume_step(self.folder, self.manifest)
        if step:
            self._load(run, step)
        self.saved_step = step
        return step

    def _load(self, run: Stateful, step: int) -> None:
        path, state = step_folder(self.folder, step), run.state_dict(empty=True)
        if self.extra_state is not None:
            state["extra_state"] = self.extra_state.state_dict(empty=True)
        try:
            state = load_checkpoint(state, path)
        except InputError as error:
            raise InputError(
                f"{path} cannot be read ({error}); delete it, and the run resumes from the previous "
                "checkpoint or from the beginning"
            ) from error
        if self.extra_state is not None:
            self.extra_state.load_state(state.pop("extra_state"), step)
        run.load_state(state, step)

    def _delete_old(self) -> None:
        lasting = lasting_checkpoints(self.folder, self.settings.keep_every)
        for old in sorted(self.folder.glob(STEPS))[: -self.settings.keep_checkpoints]:
            if old in lasting:
                continue
            if not (old / MANIFEST).is_file() or not user_files(old):
                shutil.rmtree(old)

    def _record_duration(self, seconds: float) -> None:
        if self.world.preemption is not None:
            self.world.preemption.record_checkpoint(self.folder, seconds)


def resume_step(folder: Path, manifest: Manifest) -> int:
    """Return the step of the newest complete checkpoint, 0 without one; reached by all ranks.

    InputError when the checkpoints in the folder belong to a different run. It lists the fields
    that differ.
    """
    return on_rank_0(lambda: _newest_step(folder, manifest))


def _newest_step(folder: Path, manifest: Manifest) -> int:
    path = newest_checkpoint(folder)
    if path is None:
        return 0
    newest = require_artifact(path, manifest.stage)
    refuse(
        f"{folder} holds checkpoints of another run; move or delete it, or restore these settings:",
        newest.differences(manifest),
    )
    return checkpoint_step(path)


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after a step."""
    return folder / f"step_{step:08d}"
