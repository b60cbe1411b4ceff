"""A trace of chosen training steps on chosen ranks, for a look at what a step is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minitron_mp.config.training import ProfileConfig
from minitron_mp.distributed.launcher import under_nsys
from minitron_mp.distributed.sync import raise_on_all_ranks
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError


class Profiler:
    """Traces steps settings.steps (from 1, as they are logged) of a run on this rank, when it is one of settings.ranks.

    kind torch: a Chrome trace in `folder`, written after the last of the steps. kind nsys: cudaProfilerStart and Stop around the steps,
    which Nsight Systems obeys under --capture-range=cudaProfilerApi. InputError on all ranks where that is impossible.
    """

    def __init__(self, settings: ProfileConfig, world: World, folder: Path, name: str):
        self.settings, self.path = (
            settings,
            folder / f"{name}_steps{settings.steps[0]}-{settings.steps[1]}_rank{world.rank}.json.gz",
        )
        self.mine, self.cuda = world.rank in settings.ranks, world.device.type == "cuda"
        self.trace: Any = None
        """What goes on: torch's profiler, or True."""
        raise_on_all_ranks(self._problem(world))

    def _problem(self, world: World) -> InputError | None:
        beyond = [rank for rank in self.settings.ranks if rank >= world.size]
        if beyond:
            return InputError(
                f"profile.ranks names rank {beyond[0]}, the run has {world.size}: give ranks from 0 to {world.size - 1}"
            )
        if self.settings.kind == "nsys" and not self.cuda:
            return InputError("profile.kind nsys traces CUDA, this run is on a CPU: set profile.kind: torch")
        if self.settings.kind == "nsys" and self.mine and not under_nsys():
            how = "nsys profile --capture-range=cudaProfilerApi --capture-range-end=stop torchrun ..."
            return InputError(
                f"profile.kind nsys only says when to trace, and no nsys is there to do it: start the job with {how}, or set profile.kind: torch"
            )
        return None

    def before(self, step: int) -> None:
        """Step (from 0) begins."""
        if not self.mine or step + 1 != self.settings.steps[0]:
            return
        if self.settings.kind == "nsys":
            torch.cuda.synchronize()  # what was issued before is not part of the step
            torch.cuda.profiler.start()
            self.trace = True
            return
        kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * self.cuda]
        self.trace = torch.profiler.profile(activities=kinds, record_shapes=True)
        self.trace.start()

    def after(self, step: int, *, is_last: bool = False) -> None:
        """Step (from 0) is done. is_last: no further one comes, so an open trace ends here."""
        if self.trace is None or (step + 1 < self.settings.steps[1] and not is_last):
            return
        trace, self.trace = self.trace, None
        if self.cuda:
            torch.cuda.synchronize()
        if self.settings.kind == "nsys":
            torch.cuda.profiler.stop()
            return
        trace.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(self.path))
