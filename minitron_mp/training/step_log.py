"""StepLog: add up the steps of a log interval over the ranks, and report them on rank 0."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mp.artifacts.manifest import Validation
from minitron_mp.distillation.stream_layout import Traffic
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.options import RunOptions
from minitron_mp.training.stragglers import StragglerWatch, slowest_rank
from minitron_mp.training.throughput import Throughput, peak_memory_gib


class Diverged(InputError):
    """Error for a run with too many steps whose gradient or loss is not finite."""


@dataclass(frozen=True)
class FinishedStep:
    """One step on this rank.

    sums: float64 [4], sums of loss, divergence and cross-entropy in nats, and of valid tokens, over
    this rank's tokens; [5] with the hidden-state loss. If several ranks have the same tokens, all
    but one have zeros. alpha: weight of the hidden-state loss.
    """

    step: int
    """Number of the step, counted from 0."""
    lr: float
    grad_norm: float
    sums: Tensor
    alpha: Tensor | None = None
    num_skipped: int = 0
    """Steps without an update up to this step."""


@dataclass(frozen=True)
class RankStatus:
    """Status of one rank at the end of a log interval.

    traffic: traffic from the teacher since the last log, None on a rank without a stream. forward_s:
    seconds of the model's forward passes since the last log.
    """

    stop_requested: bool = False
    needs_checkpoint_time: bool = False
    writing_checkpoint: bool = False
    traffic: Traffic | None = None
    forward_s: float = 0.0


@dataclass(frozen=True)
class JobStatus:
    """The RankStatus of all ranks, added up; equal on all ranks. forward_s: of each rank."""

    num_stop_requests: float
    num_checkpoint_times: float
    num_writers: float
    wait_s: float
    num_bytes: float
    num_receivers: float
    peak_memory_gib: float
    forward_s: Sequence[float]


class StepLog:
    """Collects the steps of a run, and reports them at the end of a log interval.

    divergence: name of the divergence between teacher and student; None without a teacher.
    total_steps: number of steps of the run. first_step: step at which this process starts.
    straggler_factor: see TrainingConfig.
    """

    def __init__(
        self,
        options: RunOptions,
        world: World,
        *,
        divergence: str | None,
        total_steps: int,
        first_step: int,
        straggler_factor: float,
    ):
        self.options, self.world, self.divergence = options, world, divergence
        self.total_steps, self.first_step = total_steps, first_step
        self.stragglers = StragglerWatch(world, straggler_factor, options.manifest.stage)
        self.steps: list[FinishedStep] = []
        self.validations: dict[int, Validation] = {}
        """Number of a step, counted from 1 -> its validation, until the step is reported."""
        self.begin = time.perf_counter()
        self.start_clock()

    @property
    def pending(self) -> bool:
        """Whether steps wait for a report."""
        return bool(self.steps)

    def add(self, step: FinishedStep) -> None:
        """Add a step to the next report."""
        self.steps.append(step)

    def start_clock(self) -> None:
        """Start the clock of the next steps. Call it after a log, a checkpoint, or a pause."""
        self.start = time.perf_counter()

    def resume_clock(self, seconds: float) -> None:
        """Start the clock with the result of stop_clock(), so that it leaves out a pause."""
        self.start = time.perf_counter() - seconds

    def stop_clock(self) -> float:
        """Wait for the kernels of the last step, and return the seconds since start_clock()."""
        if self.world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return time.perf_counter() - self.start

    def report(
        self, status: RankStatus, seconds: float, checkpoint_blocked_s: float | None
    ) -> tuple[JobStatus, list[StepMetrics]]:
        """Return the status of the job, and the metrics of each step for publish().

        It adds up the collected steps over all ranks in one collective; reached by all ranks.
        seconds: result of stop_clock(). checkpoint_blocked_s: seconds for which checkpoints blocked
        training.
        """
        rows, job = self._reduce(status)
        num_steps = len(self.steps)
        step_s = seconds / num_steps
        # Mean time over all steps of this process, with checkpoints and pauses.
        pace_s = (time.perf_counter() - self.begin) / max(1, self.steps[-1].step + 1 - self.first_step)
        shared = Throughput(peak_memory_gib=job.peak_memory_gib, save_s=checkpoint_blocked_s)
        slowest = slowest_rank([total / num_steps for total in job.forward_s], self.world.parallel.pp)
        self.stragglers.report(slowest, self.steps[-1].step + 1)
        if slowest is not None:
            shared = replace(
                shared,
                slowest_rank=slowest.rank,
                slowest_forward_s=slowest.forward_s,
                median_forward_s=slowest.median_s,
            )
        if job.num_receivers:
            shared = replace(
                shared,
                teacher_wait_s=job.wait_s / job.num_receivers / num_steps,
                transport_gb_per_s=job.num_bytes / seconds / 1e9,
            )
        metrics = []
        for finished, row in zip(self.steps, rows):
            work = self.options.work
            rates: dict[str, Any] = dict(work.rates(finished.step, step_s)) if work else {}
            measured = replace(
                shared,
                **rates,
                eta_s=pace_s * (self.total_steps - finished.step - 1),
                tokens_per_s_per_gpu=row[3] / step_s / self.world.job_size,
            )
            step = _metrics(finished, row, step_s, self.divergence, measured)
            validation = self.validations.pop(step.step, None)
            if validation is not None:
                step = replace(step, valid_loss=validation.loss, valid_kl=validation.kl)
            metrics.append(step)
        return job, metrics

    def publish(self, metrics: Sequence[StepMetrics]) -> None:
        """Call on_step for each step on rank 0."""
        if self.world.is_main:
            for step in metrics:
                self.options.on_step(step)
        self.steps.clear()

    def _reduce(self, status: RankStatus) -> tuple[list[list[float]], JobStatus]:
        """Return the global sums of each step, and the status of the job."""
        world = self.world
        sums = torch.stack([finished.sums for finished in self.steps])
        # Each rank sets one entry of these lists, so that the sum holds all entries.
        memory, forward_s = [0.0] * world.size, [0.0] * world.size
        memory[world.rank] = peak_memory_gib(world.device)
        forward_s[world.rank] = status.forward_s
        traffic = status.traffic or Traffic(0.0, 0)
        flags = [
            float(status.stop_requested),
            float(status.needs_checkpoint_time),
            float(status.writing_checkpoint),
            traffic.wait_s,
            float(traffic.num_bytes),
            float(status.traffic is not None),
        ]
        totals = torch.cat([sums.flatten(), _on_device([*flags, *memory, *forward_s], sums)])
        dist.all_reduce(totals)
        values, columns, split = totals.tolist(), sums.shape[1], sums.numel()
        rows = [values[i : i + columns] for i in range(0, split, columns)]
        counts, lists = values[split : split + len(flags)], values[split + len(flags) :]
        stop_requests, checkpoint_times, writers, wait_s, num_bytes, receivers = counts
        return rows, JobStatus(
            num_stop_requests=stop_requests,
            num_checkpoint_times=checkpoint_times,
            num_writers=writers,
            wait_s=wait_s,
            num_bytes=num_bytes,
            num_receivers=receivers,
            peak_memory_gib=max(lists[: world.size]),
            forward_s=lists[world.size :],
        )


def _on_device(values: Sequence[float], like: Tensor) -> Tensor:
    """Return values in the dtype and on the device of a tensor, without waiting for the device.

    A copy from memory that is not pinned waits for it.
    """
    on_host = torch.tensor(values, dtype=like.dtype, pin_memory=like.is_cuda)
    return on_host.to(like.device, non_blocking=True)


def _metrics(
    finished: FinishedStep,
    row: list[float],
    step_s: float,
    divergence_name: str | None,
    measured: Throughput,
) -> StepMetrics:
    """Return the metrics of a step: means over its valid tokens, from global sums; NaN without any."""
    loss, divergence, cross_entropy, tokens, *hidden_states = row
    divisor = tokens or math.nan
    mean_states = alpha = None
    if hidden_states:
        assert finished.alpha is not None
        alpha = finished.alpha.item()
        mean_states = hidden_states[0] / divisor
        loss += alpha * hidden_states[0]
    return StepMetrics(
        step=finished.step + 1,
        loss=loss / divisor,
        divergence=None if divergence_name is None else divergence / divisor,
        ce=cross_entropy / divisor,
        grad_norm=finished.grad_norm,
        lr=finished.lr,
        num_tokens=round(tokens),
        step_time_s=step_s,
        tokens_per_s=tokens / step_s,
        states=mean_states,
        alpha=alpha,
        num_skipped=finished.num_skipped or None,
        divergence_name=divergence_name or "",
        measured=measured,
    )
