"""Profiler: a trace of chosen training steps on chosen ranks."""

from __future__ import annotations

from pathlib import Path

import torch

from minitron_mp.config.training import ProfileConfig
from minitron_mp.distributed.launcher import under_nsys
from minitron_mp.distributed.sync import raise_on_all_ranks
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError


class Profiler:
    """Traces the steps settings.steps (from 1, as in the log) on the ranks settings.ranks.

    kind torch: writes a Chrome trace to `folder` after the last of these steps. kind nsys: calls
    cudaProfilerStart and cudaProfilerStop, for Nsight Systems with --capture-range=cudaProfilerApi.
    InputError on all ranks if tracing is not possible.
    """

    def __init__(self, settings: ProfileConfig, world: World, folder: Path, name: str):
        first, last = settings.steps
        self.settings = settings
        self.path = folder / f"{name}_steps{first}-{last}_rank{world.rank}.json.gz"
        self.enabled = world.rank in settings.ranks
        self.uses_cuda = world.device.type == "cuda"
        self.active = False
        self.trace: torch.profiler.profile | None = None
        raise_on_all_ranks(self._problem(world))

    def _problem(self, world: World) -> InputError | None:
        beyond = [rank for rank in self.settings.ranks if rank >= world.size]
        if beyond:
            return InputError(
                f"profile.ranks has rank {beyond[0]}, the run has {world.size} ranks; give ranks from 0 to "
                f"{world.size - 1}"
            )
        if self.settings.kind == "nsys" and not self.uses_cuda:
            return InputError("profile.kind nsys traces CUDA, this run is on a CPU; set profile.kind: torch")
        if self.settings.kind == "nsys" and self.enabled and not under_nsys():
            command = "nsys profile --capture-range=cudaProfilerApi --capture-range-end=stop torchrun ..."
            return InputError(
                "profile.kind nsys needs a job that runs under Nsight Systems; start it with "
                f"{command}, or set profile.kind: torch"
            )
        return None

    def before(self, step: int) -> None:
        """Start the trace if this step (from 0) is the first of the range."""
        if not self.enabled or step + 1 != self.settings.steps[0]:
            return
        self.active = True
        if self.settings.kind == "nsys":
            torch.cuda.synchronize()  # exclude earlier work from the trace
            torch.cuda.profiler.start()
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.uses_cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.trace = torch.profiler.profile(activities=activities, record_shapes=True)
        self.trace.start()

    def after(self, step: int, *, is_last: bool = False) -> None:
        """End the trace if this step (from 0) is the last of the range, or the last of the run."""
        if not self.active or (step + 1 < self.settings.steps[1] and not is_last):
            return
        self.active = False
        if self.uses_cuda:
            torch.cuda.synchronize()
        if self.trace is None:
            torch.cuda.profiler.stop()
            return
        self.trace.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.trace.export_chrome_trace(str(self.path))
        self.trace = None
