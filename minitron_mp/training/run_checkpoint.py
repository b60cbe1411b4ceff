"""RunCheckpoints: save the checkpoints of a training run, and resume from the newest one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from minitron_mp.artifacts.checkpoint import AsyncCheckpointWriter, load_checkpoint, save_checkpoint
from minitron_mp.artifacts.manifest import (
    MANIFEST,
    TIMING,
    Manifest,
    Validation,
    require_artifact,
    user_files,
)
from minitron_mp.artifacts.run_folder import (
    STEPS,
    checkpoint_step,
    is_kept_step,
    lasting_checkpoints,
    newest_checkpoint,
)
from minitron_mp.config.training import TrainingConfig
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError, TransientError, refuse
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

    def save(
        self, run: Stateful, step: int, validation: Validation | None = None, *, keep: bool = True
    ) -> None:
        """Write a checkpoint of a run after a step. With async_save, start to write it.

        validation: of this step. keep: False to measure the duration, and delete the checkpoint when
        it is complete.
        """
        self.finish()
        start = time.perf_counter()
        state = run.state_dict()
        if self.extra_state is not None:
            state["extra_state"] = self.extra_state.state_dict()
        target = step_folder(self.folder, step) if keep else self.folder / TIMING
        clean = self._delete_old if keep else lambda: shutil.rmtree(target)
        lasts = is_kept_step(step, self.settings.keep_every)
        manifest = self.manifest.model_copy(update={"validation": validation, "lasts": lasts})
        if self.writer is not None:
            self.writer.start(state, target, manifest, clean)
        else:
            save_checkpoint(state, target, manifest)
            on_rank_0(clean)
        self._save_started = start
        if keep:
            self.saved_step = step
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
        start = resume_point(self.folder, self.manifest)
        self.manifest = start.manifest
        if start.step:
            self._load(run, start.step)
        self.saved_step = start.step
        return start.step

    def _load(self, run: Stateful, step: int) -> None:
        path, state = step_folder(self.folder, step), run.state_dict(empty=True)
        if self.extra_state is not None:
            state["extra_state"] = self.extra_state.state_dict(empty=True)
        try:
            state = load_checkpoint(state, path)
        except TransientError:
            raise
        except InputError as error:
            raise InputError(
                f"{path} cannot be read ({error}); delete it, and the run resumes from the previous "
                "checkpoint or from the beginning"
            ) from error
        if self.extra_state is not None:
            self.extra_state.load_state(state.pop("extra_state"), step)
        run.load_state(state, step)

    def _delete_old(self) -> None:
        """Keep the keep_checkpoints newest checkpoints, lasting ones, and those with user files.

        Checkpoints of early stops count as older than all others, except the newest one. So a run
        that is started again and again at one place keeps the checkpoints before it.
        """
        paths = sorted(self.folder.glob(STEPS))
        regular = [path for path in paths[:-1] if self.is_due(checkpoint_step(path))]
        early = [path for path in paths[:-1] if path not in regular]
        lasting = lasting_checkpoints(self.folder, self.settings.keep_every)
        for old in [*early, *regular, *paths[-1:]][: -self.settings.keep_checkpoints]:
            if old in lasting:
                continue
            if not (old / MANIFEST).is_file() or not user_files(old):
                shutil.rmtree(old)

    def _record_duration(self, seconds: float) -> None:
        if self.world.preemption is not None:
            self.world.preemption.record_checkpoint(self.folder, seconds)


@dataclass(frozen=True)
class ResumePoint:
    """The step from which a run resumes, and its manifest with the changes of its settings."""

    step: int
    manifest: Manifest


def resume_point(folder: Path, manifest: Manifest, accept: Collection[str] = ()) -> ResumePoint:
    """Return the step of the newest complete checkpoint, 0 without one; reached by all ranks.

    accept: settings that may differ from those of the checkpoint. InputError when the checkpoints in
    the folder belong to a different run. It lists the fields that differ.
    """
    return on_rank_0(lambda: _newest(folder, manifest, accept))


def _newest(folder: Path, manifest: Manifest, accept: Collection[str]) -> ResumePoint:
    path = newest_checkpoint(folder)
    if path is None:
        return ResumePoint(0, manifest)
    saved, step = require_artifact(path, manifest.stage), checkpoint_step(path)
    manifest = manifest.accepting(accept, saved, step)
    refuse(
        f"{folder} holds checkpoints of another run; move or delete it, or restore these settings:",
        saved.differences(manifest.at_step(step)),
    )
    return ResumePoint(step, manifest)


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after a step."""
    return folder / f"step_{step:08d}"
