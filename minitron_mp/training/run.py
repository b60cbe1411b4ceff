"""TrainingRun: one model in training, with its forward and backward passes and optimizer updates.

A step is a pure function of weights, optimizer state and step number, because seed and step
determine batches and random streams. So a checkpoint holds weights, optimizer state, step and
number of updates, and a resumed run is bitwise identical to an uninterrupted run with the same
layout.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from minitron_mp.artifacts.manifest import Validation
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.console import say
from minitron_mp.distillation.hidden_states import HiddenStatesLoss
from minitron_mp.distillation.stream_layout import Traffic
from minitron_mp.distillation.teacher import Teacher
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.preemption import OTHER_RANK
from minitron_mp.distributed.schedule import run_schedule
from minitron_mp.distributed.world import seed_all
from minitron_mp.models.sharded_model import ShardedModel, unwrap
from minitron_mp.training.loss import TrainingLoss
from minitron_mp.training.non_finite import LOSSES, describe
from minitron_mp.training.optimizer import TrainableModel
from minitron_mp.training.options import RunOptions
from minitron_mp.training.run_checkpoint import RunCheckpoints
from minitron_mp.training.step_log import Diverged, FinishedStep, RankStatus, StepLog
from minitron_mp.training.stragglers import ForwardTimer
from minitron_mp.training.validation import Validator

OnOutput = Callable[[torch.Tensor, Batch], object]


class TrainingRun:
    """One model in training. The constructor loads the newest checkpoint of this run, if any.

    model: model whose chunks are wrapped for data parallelism. steps_done: number of optimizer
    steps, with those before a resume. num_skipped_in_a_row: newest steps without an update, because
    their gradient or loss was not finite. stop_request: reason why all ranks stop, or ""; it is
    empty on all ranks or on no rank. All ranks must call every method.
    """

    def __init__(
        self,
        model: ShardedModel,
        teacher: Teacher | None,
        settings: DistillConfig | CorrectionConfig,
        options: RunOptions,
    ):
        self.world, self.teacher = model.world, teacher
        self.settings, self.options = settings, options
        self.trainable = TrainableModel(model, settings)
        self.model = self.trainable.model
        self.hidden_states = (
            HiddenStatesLoss(self.model.chunks, teacher, settings, self.world) if settings.states else None
        )
        self.loss = TrainingLoss(self.model, teacher, settings)
        self.timer = ForwardTimer(self.world.device)
        self.steps_done = 0
        self.num_skipped_in_a_row = 0
        self.stop_request = ""
        self.traffic = Traffic(0.0, 0)
        self.time_a_checkpoint = False
        """Whether a checkpoint must be written now to measure its duration."""
        self.validator: Validator | None = None
        if options.measure is not None and settings.valid_interval:
            self.validator = Validator(settings, options.measure)
        self.checkpoints: RunCheckpoints | None = None
        if options.checkpoints is not None:
            self.checkpoints = RunCheckpoints(options.checkpoints, options, settings, self.world)
            self.checkpoints.resume(self)
        if settings.collect_interval:
            gc.disable()
        self.step_log = StepLog(
            options,
            self.world,
            divergence=settings.divergence if teacher is not None else None,
            total_steps=settings.steps,
            first_step=self.steps_done,
            straggler_factor=settings.straggler_factor,
        )

    @property
    def log_is_due(self) -> bool:
        """Whether a log interval ends after the current step."""
        return self.steps_done % self.settings.log_interval == 0

    @property
    def validation(self) -> Validation | None:
        """The validation of the current step, or None. Its loss is finite."""
        newest = self.validator.newest if self.validator is not None else None
        if newest is None or newest.step != self.steps_done or not math.isfinite(newest.loss):
            return None
        return newest

    @property
    def early_stop(self) -> str:
        """Reason why the run ends at the current step, or "". It is equal on all ranks."""
        return self.validator.stop_reason if self.validator is not None else ""

    @property
    def save_is_due(self) -> bool:
        """Whether a checkpoint interval ends after the current step."""
        return self.checkpoints is not None and self.checkpoints.is_due(self.steps_done)

    def seed_step(self) -> None:
        """Seed the random streams of the next step."""
        # Recorded layers keep their random streams, but use no random numbers.
        if not self.settings.cuda_graphs:
            seed_all(self.options.seed + self.steps_done)

    def forward_backward(self, batches: Sequence[Batch], on_output: OnOutput | None = None) -> None:
        """Accumulate the gradients of a step.

        on_output: function that replaces self.loss and calls it. Default: self.loss.
        """
        self.trainable.zero_grad()
        self.loss.sums.zero_()
        if self.hidden_states is None:
            run_schedule(
                self.model.chunks,
                batches,
                self.world,
                on_output or self.loss,
                train=True,
                timer=self.timer,
            )
            return
        self.hidden_states.start_step()
        run_schedule(
            self.model.chunks,
            batches,
            self.world,
            on_output or self.loss,
            train=True,
            on_batch=self.hidden_states.begin,
            timer=self.timer,
        )

    def update(self) -> None:
        """Apply the gradients of forward_backward(), unless they or the losses are not finite.

        Diverged on all ranks when too many steps in a row have no update.
        """
        lr = self.trainable.next_lr()
        num_non_finite = self._count_non_finite_losses()
        grad_norm = self.trainable.gradient_norm()
        is_finite = math.isfinite(grad_norm) and num_non_finite.item() == 0  # both equal on all ranks
        skipped_because = "" if is_finite else self._describe_skip()
        if not skipped_because:
            self.trainable.apply(grad_norm)
        self._end_step(lr, grad_norm, is_skipped=bool(skipped_because))
        self.steps_done += 1
        if skipped_because:
            self._report_skip(grad_norm, skipped_because)
        else:
            self.num_skipped_in_a_row = 0
        interval = self.settings.collect_interval
        if interval and self.steps_done % interval == 0:
            gc.collect()

    def _count_non_finite_losses(self) -> torch.Tensor:
        """Return the number of ranks on which a loss of the step is not finite, on the device.

        It is issued before the gradient norm, for which the host waits. So the host waits once.
        """
        finite = self.loss.sums.isfinite().all()
        if self.hidden_states is not None:
            finite = finite & self.hidden_states.is_finite()
        count = (~finite).float()
        dist.all_reduce(count)
        return count

    def _describe_skip(self) -> str:
        loss, divergence, cross_entropy, _ = self.loss.sums.tolist()
        hidden_states = 0.0 if self.hidden_states is None else self.hidden_states.sum.item()
        sums = dict(zip(LOSSES, (cross_entropy, divergence, hidden_states, loss), strict=True))
        return describe(self.trainable, sums, self.world)

    def _end_step(self, lr: float, grad_norm: float, *, is_skipped: bool) -> None:
        """Add the step to the log, and update the hidden-state loss."""
        num_skipped = self.steps_done + 1 - self.trainable.num_updates
        sums = self.loss.sums.clone()
        if not (self.world.is_last_stage and self.world.groups.tp.rank() == 0):
            sums.zero_()  # only one tensor-parallel rank of the last stage adds its sums
        if self.hidden_states is None:
            self.step_log.add(FinishedStep(self.steps_done, lr, grad_norm, sums, num_skipped=num_skipped))
            return
        alpha = self.hidden_states.alpha
        all_sums = torch.cat([sums, self.hidden_states.sum[None]])
        self.step_log.add(FinishedStep(self.steps_done, lr, grad_norm, all_sums, alpha, num_skipped))
        if is_skipped:
            self.hidden_states.skip_step()
            return
        weighted = sums[1] * self.settings.kl_weight * self.settings.temperature**2
        self.hidden_states.end_step(weighted, sums[3], lr)

    def _report_skip(self, grad_norm: float, where: str) -> None:
        """Log a step without an update. Diverged if it is one too many."""
        self.num_skipped_in_a_row += 1
        num_skipped = self.steps_done - self.trainable.num_updates
        stage, most = self.options.manifest.stage, self.settings.max_skipped
        what = f"step {self.steps_done} has gradient norm {grad_norm}; {where}"
        say(
            f"{stage}: update skipped: {what} ({self.num_skipped_in_a_row} in a row, {num_skipped} of "
            f"{self.steps_done} steps)"
        )
        no_update = self.steps_done == self.settings.steps and not self.trainable.num_updates
        if self.num_skipped_in_a_row <= most and not no_update:
            return
        self.log()
        raise Diverged(
            f"{self.num_skipped_in_a_row} steps in a row have a gradient or loss that is not finite, "
            f"max_skipped allows {most}: {what}; lower lr, raise warmup_steps, set precision: fp32, or raise "
            "max_skipped"
        )

    def validate(self) -> None:
        """Measure the model on held-out text if a validation is due."""
        if self.validator is None or not self.validator.is_due(self.steps_done):
            return
        seconds = self.step_log.stop_clock()
        with self.trainable.gathered():
            chunks = [unwrap(chunk) for chunk in self.model.chunks]
            validation = self.validator.validate(self.model.with_chunks(chunks), self.steps_done)
        for chunk in self.model.chunks:
            chunk.train()
        self.step_log.validations[self.steps_done] = validation
        self.step_log.resume_clock(seconds)
        kl = "" if validation.kl is None else f", KL {validation.kl:.4f}"
        stage, best = self.options.manifest.stage, self.validator.best_text
        say(f"{stage}: held-out loss {validation.loss:.4f}{kl} after step {self.steps_done}{best}")

    def log(self) -> None:
        """Report the steps since the last log, and exchange stop requests with all ranks.

        It synchronises with the device and calls one collective.
        """
        if not self.step_log.pending:
            return
        seconds = self.step_log.stop_clock()
        local_request, status = self._status(seconds / len(self.step_log.steps))
        blocked_s = self.checkpoints.take_blocked_s() if self.checkpoints is not None else None
        status = replace(status, forward_s=self.timer.take_s())
        job, metrics = self.step_log.report(status, seconds, blocked_s)
        self.stop_request = (local_request or OTHER_RANK) if job.num_stop_requests else ""
        self.time_a_checkpoint = job.num_checkpoint_times > 0
        self.step_log.publish(metrics)
        if self.checkpoints is not None and self.checkpoints.pending and not job.num_writers:
            self.checkpoints.finish()
        self.step_log.start_clock()

    def _status(self, step_s: float) -> tuple[str, RankStatus]:
        """Return this rank's stop request ("" without one) and its status for the log."""
        traffic, received = self.teacher.traffic() if self.teacher is not None else None, None
        if traffic is not None:
            received = Traffic(
                traffic.wait_s - self.traffic.wait_s, traffic.num_bytes - self.traffic.num_bytes
            )
            self.traffic = traffic
        checkpoints, preemption = self.checkpoints, self.world.preemption
        if checkpoints is None:
            return "", RankStatus(traffic=received)
        if preemption is None:
            return "", RankStatus(writing_checkpoint=checkpoints.writing, traffic=received)
        preemption.step_s.append(step_s)
        stream_end = self.teacher.stream_end if self.teacher is not None else None
        num_steps = self.settings.log_interval + (stream_end.lead_steps if stream_end else 0)
        validation_s = 0.0
        if self.validator is not None:
            slowest_step_s = max(preemption.step_s)
            validation_s = self.validator.seconds_until(self.steps_done, num_steps, slowest_step_s)
        request = preemption.stop_request(
            self.world.is_main,
            steps=num_steps,
            checkpoints=2 if checkpoints.pending else 1,
            validation_s=validation_s,
        )
        needs_time = (
            self.world.is_main
            and not checkpoints.pending
            and preemption.needs_checkpoint_time(checkpoints.folder)
        )
        return request, RankStatus(bool(request), needs_time, checkpoints.writing, received)

    def save(self, *, wait: bool = False, keep: bool = True) -> None:
        """Write a checkpoint after the current step, unless it exists or the step is the last one.

        wait: return after it is committed, also with async_save. keep: False for a checkpoint that
        only measures the duration.
        """
        if self.checkpoints is None:
            return
        if self.checkpoints.is_needed(self.steps_done):
            self.log()
            self.checkpoints.save(self, self.steps_done, self.validation, keep=keep)
            self.time_a_checkpoint = False
            self.step_log.start_clock()
        if wait:
            self.checkpoints.finish()

    def state_dict(self, *, empty: bool = False) -> dict[str, Any]:
        """Return the sharded state of weights, optimizer and hidden-state loss.

        empty: return uninitialised tensors, to read a checkpoint into for load_state().
        """
        state = self.trainable.state_dict(empty=empty)
        state["num_skipped_in_a_row"] = self.num_skipped_in_a_row
        if self.validator is not None:
            state["validation"] = self.validator.state()
        return {**state, **self.hidden_states.state()} if self.hidden_states else state

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Restore a state_dict(empty=True) that a checkpoint has filled."""
        self.trainable.load_state(state, step)
        self.num_skipped_in_a_row = state.get("num_skipped_in_a_row", 0)
        if self.hidden_states:
            self.hidden_states.load(state, self.trainable.num_updates)
        if self.validator is not None and "validation" in state:
            self.validator.load(state["validation"])
        self.steps_done = step

    def finalize(self) -> None:
        """End the run: complete its checkpoint and weights, and release its memory."""
        if self.checkpoints is not None:
            self.checkpoints.finish()
        if self.world.preemption is not None:
            self.world.preemption.end_run(self.options.checkpoints)
        self.trainable.finalize()
        if self.settings.collect_interval:
            gc.enable()
        if self.hidden_states:
            self.hidden_states.remove()
