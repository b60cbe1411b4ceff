"""The training loop: Megatron's schedules, data parallel wrapper and optimizer around one loss.

With a teacher it is distillation; without one, and with ce_weight, plain fine-tuning. A step is a pure function of (weights,
optimizer state, step number): the batch and the random streams are derived from seed and step, so a checkpoint is model,
optimizer and step, and a resumed run repeats the unbroken one bitwise at the same layout.
"""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from minitron_mp.artifacts.checkpoint import (
    AsyncCheckpointWriter,
    load_checkpoint,
    model_state,
    save_checkpoint,
    scaling_state,
)
from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.artifacts.optimizer_state import empty_optimizer_state, load_optimizer_state, optimizer_state
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.training import CorrectionConfig, TrainingConfig
from minitron_mp.distillation.hidden_states import HiddenStatesLoss
from minitron_mp.distillation.last_stage_loss import last_stage_loss, mark_head_gradient_ready
from minitron_mp.distillation.stream_layout import Traffic
from minitron_mp.distillation.teacher import Teacher, signal_of
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.launcher import environment_variable
from minitron_mp.distributed.schedule import run_schedule
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError, refuse
from minitron_mp.losses.fused import Objective
from minitron_mp.models.build import DTYPES, output_weight, unwrap
from minitron_mp.models.precision import silently_wrong
from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.run_checkpoint import resume_step, step_folder
from minitron_mp.training.throughput import Throughput, Work, peak_memory_gib


class Diverged(InputError):
    """A loss or gradient norm is not finite."""


class TrainingRun:
    """One model in training: wrapped, with its optimizer, from its newest checkpoint. done: steps so far.

    checkpoints None: somebody else keeps its state (sharded(), fill()).
    """

    def __init__(
        self,
        chunks: list[Any],
        teacher: Teacher | None,
        settings: DistillConfig | CorrectionConfig,
        world: World,
        *,
        vocab_size: int,
        checkpoints: Path | None,
        manifest: Manifest,
        on_step: Callable[[StepMetrics], None] = lambda metrics: None,
        companion: Any = None,
        work: Work | None = None,
    ):
        self.settings, self.world, self.checkpoints, self.manifest, self.on_step = (
            settings,
            world,
            checkpoints,
            manifest,
            on_step,
        )
        self.companion, self.teacher, self.work = companion, teacher, work
        self.models, self.optimizer, self.scheduler = _prepare(chunks, settings, world)
        self.states = HiddenStatesLoss(self.models, teacher, settings, world) if settings.states else None
        self.loss = _LossOnLastStage(self.models[-1], teacher, settings, world, vocab_size)
        self.sums: list[torch.Tensor] = []
        self.pending: list[tuple[int, float, float, torch.Tensor | None]] = []
        """step, learning rate, gradient norm, alpha"""
        self.done = 0
        self.background = AsyncCheckpointWriter() if settings.async_save and checkpoints is not None else None
        self.leave = ""
        """Why all ranks leave, when they have agreed to."""
        self.save_now = False
        """A checkpoint is to be timed."""
        self.saving_since, self.stood_s, self.traffic = 0.0, 0.0, Traffic(0.0, 0)
        if checkpoints is not None:
            self._resume(checkpoints)
        if settings.collect_interval:
            gc.disable()
        self.saved = self.first = self.done
        self.begin = time.perf_counter()
        self.start_clock()

    def start_clock(self) -> None:
        self.clock = time.perf_counter()

    def step(self, batches: Sequence[Batch], *, is_last: bool = False) -> None:
        """One optimizer step. is_last: of this call of train(): log and save after it."""
        self.accumulate(batches, self.loss)
        self.update(is_last=is_last)

    def accumulate(self, batches: Sequence[Batch], loss: Callable) -> None:
        """Gradients of a step. loss: self.loss, or what calls it."""
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.loss.sums.zero_()
        if self.states:
            self.states.start_step()
        run_schedule(
            self.models,
            batches,
            self.world,
            loss,
            train=True,
            **({"on_batch": self.states.begin} if self.states else {}),
        )

    def update(self, *, is_last: bool = False) -> None:
        """The optimizer's part of a step, its log, and a checkpoint when it is time."""
        self.scheduler.step(increment=1)
        _, grad_norm, _ = self.optimizer.step()
        # Of this rank alone: elsewhere there is no loss, or the same.
        sums = (
            self.loss.sums.clone()
            if self.world.is_last_stage and self.world.groups.tp.rank() == 0
            else torch.zeros_like(self.loss.sums)
        )
        lr, alpha = self.optimizer.param_groups[0]["lr"], self.states and self.states.alpha
        self.sums.append(torch.cat([sums, self.states.sum[None]]) if self.states else sums)
        self.pending.append((self.done, lr, float(grad_norm or 0.0), alpha))
        if self.states:
            self.states.end_step(
                sums[1] * self.settings.kl_weight * self.settings.temperature**2, sums[3], lr
            )
        self.done += 1
        if self.settings.collect_interval and self.done % self.settings.collect_interval == 0:
            gc.collect()
        due = self.checkpoints is not None and (self.done % self.settings.checkpoint_interval == 0 or is_last)
        if due or self.done % self.settings.log_interval == 0 or is_last:
            self.log()
        if due or self.save_now:
            self.save()

    def log(self) -> None:
        """Tell of the steps since the last call, and agree on what comes next; reached by all ranks.

        One collective, and a host synchronisation before it, for the optimizer's kernels belong to the step.
        """
        world = self.world
        if world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        seconds = time.perf_counter() - self.clock
        each = seconds / len(self.pending)
        steps = torch.stack(self.sums)
        wish, measure = self._wishes(each)
        signals = self.teacher.traffic() if self.teacher is not None else None
        traffic = signals or Traffic(0.0, 0)
        wait_s = traffic.wait_s - self.traffic.wait_s
        num_bytes = traffic.num_bytes - self.traffic.num_bytes
        self.traffic = traffic
        writing = self.background is not None and self.background.writing
        memory = [0.0] * world.rank + [peak_memory_gib(world.device)] + [0.0] * (world.size - world.rank - 1)
        own = [bool(wish), measure, writing, wait_s, num_bytes, signals is not None, *memory]
        totals = torch.cat([steps.flatten(), steps.new_tensor(own)])
        dist.all_reduce(totals)
        found, columns = totals.tolist(), steps.shape[1]
        rows = [found[i : i + columns] for i in range(0, steps.numel(), columns)]
        wishes, to_measure, writers, wait_s, num_bytes, receivers, *memory = found[steps.numel() :]
        self.leave, self.save_now = (wish or "another rank was told to") if wishes else "", to_measure > 0
        clock = {"peak_memory_gib": max(memory), "save_s": self.stood_s or None}
        if receivers:
            clock |= {
                "teacher_wait_s": wait_s / receivers / len(self.pending),
                "transport_gb_per_s": num_bytes / seconds / 1e9,
            }
        pace, self.stood_s = (time.perf_counter() - self.begin) / max(1, self.done - self.first), 0.0
        for (step, lr, grad_norm, alpha), row in zip(self.pending, rows):
            eta_s = pace * (self.settings.steps - step - 1)
            rates = self.work.rates(step, each) if self.work else {}
            measured = Throughput(
                **clock, **rates, eta_s=eta_s, tokens_per_s_per_gpu=row[3] / each / world.job_size
            )
            self._tell(step, lr, grad_norm, alpha, row, each, measured)
        self.pending.clear()
        self.sums.clear()
        if self.background is not None and self.background.pending and not writers:
            self.finish_save()
        self.start_clock()

    def _wishes(self, step_s: float) -> tuple[str, bool]:
        """Why this rank wants to leave; and whether a checkpoint is to be timed, which the first rank says."""
        leaving = self.world.preemption
        stream_end = self.teacher.stream_end if self.teacher is not None else None
        if leaving is None or self.checkpoints is None:
            return "", False
        leaving.step_s.append(step_s)
        steps = self.settings.log_interval + (stream_end.lead_steps if stream_end else 0)
        pending = self.background is not None and self.background.pending
        measure = self.world.is_main and not pending and leaving.unmeasured(self.checkpoints)
        return leaving.why(self.world.is_main, steps=steps, saves=1 + pending), measure

    def _tell(
        self,
        step: int,
        lr: float,
        grad_norm: float,
        alpha: Any,
        row: Sequence[float],
        each: float,
        measured: Throughput,
    ) -> None:
        """Of one step, on rank 0; Diverged on all ranks."""
        loss, kl, ce, tokens, *inside = row
        matched = {}
        for states in inside:
            matched = {"states": states / tokens, "alpha": alpha.item()}
            loss += alpha.item() * states
        parts = (loss / tokens, kl / tokens, ce / tokens, grad_norm, lr, round(tokens), each, tokens / each)
        metrics = StepMetrics(step + 1, *parts, **matched, measured=measured)
        if not math.isfinite(metrics.loss) or not math.isfinite(grad_norm):
            raise Diverged(
                f"the loss of step {step + 1} is {metrics.loss}, its gradient norm {grad_norm}; lower lr, raise warmup_steps or set precision: fp32"
            )
        if self.world.is_main:
            self.on_step(metrics)

    def sharded(self, *, empty: bool = False) -> dict[str, Any]:
        """Sharded state of weights and optimizer (and of losses on states); empty: as checkpoint.load() wants it, on every rank."""
        late = self.settings.overlap and not empty  # the last parameter gather is still to come
        for chunk in self.models if late else []:
            chunk.disable_forward_pre_hook(param_sync=True)
        model = model_state([m.module for m in self.models], self.world)
        optimizer = (empty_optimizer_state if empty else optimizer_state)(self.optimizer, model)
        model |= scaling_state([m.module for m in self.models], self.world)
        for chunk in self.models if late else []:
            chunk.enable_forward_pre_hook()
        return {**model, **optimizer, **(self.states.state() if self.states else {})}

    def fill(self, state: dict[str, Any], step: int) -> None:
        """Take over a loaded sharded(empty=True) of this step."""
        # Transformer Engine 2.16 takes the histories of delayed scaling from nobody, for they are pickled; these are from our own checkpoint.
        with environment_variable("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1"):
            for i, chunk in enumerate(self.models):
                chunk.module.load_state_dict(state[f"model{i}"] | state.get(f"scaling{i}", {}), strict=False)
        load_optimizer_state(self.optimizer, state, step=step)
        if self.states:
            self.states.load(state, step)
        self.scheduler.step(increment=step)
        self.done = step

    def save(self) -> None:
        """Write a checkpoint of now, unless there is one; the last step needs none. Reached by all ranks."""
        if self.checkpoints is None or self.done == self.saved or self.done >= self.settings.steps:
            return
        if self.pending:  # logged, and so checked, before it is saved
            self.log()
        self.finish_save()
        start, folder = time.perf_counter(), self.checkpoints
        state = self.sharded()
        if self.companion is not None:
            state["companion"] = self.companion.sharded()

        def clear() -> None:
            for old in sorted(folder.glob("step_*"))[: -self.settings.keep_checkpoints]:
                shutil.rmtree(old)

        if self.background is not None:
            self.background.start(state, step_folder(folder, self.done), self.manifest, clear)
        else:
            save_checkpoint(state, step_folder(folder, self.done), self.manifest)
            on_rank_0(clear)
        self.saved, self.saving_since, seconds = self.done, start, time.perf_counter() - start
        self.stood_s += seconds
        if self.background is None:
            self._saved_in(seconds)
        self.start_clock()

    def finish_save(self) -> None:
        """Wait for a checkpoint that is being written beside the training; reached by all ranks."""
        if self.background is None or not self.background.pending:
            return
        start = time.perf_counter()
        self.background.finish()
        self.stood_s += time.perf_counter() - start
        self._saved_in(time.perf_counter() - self.saving_since)

    def _saved_in(self, seconds: float) -> None:
        if self.world.preemption is not None:
            known = self.world.preemption.save_s
            known[self.checkpoints] = max(seconds, known.get(self.checkpoints, 0.0))

    def _resume(self, folder: Path) -> None:
        """Go on from the newest whole checkpoint of this run, if there is one."""
        step = resume_step(folder, self.manifest, self.world)
        if not step:
            return
        path, state = step_folder(folder, step), self.sharded(empty=True)
        if self.companion is not None:
            state["companion"] = self.companion.sharded(empty=True)
        try:
            state = load_checkpoint(state, path)
        except InputError as error:
            raise InputError(
                f"{path} cannot be read: delete it, and the run goes on from the checkpoint before it, or from the start ({error})"
            ) from error
        if self.companion is not None:
            self.companion.fill(state.pop("companion"), step)
        self.fill(state, step)

    def settle(self) -> None:
        """Leave the bare weights current and the rest collectable; the run is over. Reached by all ranks."""
        self.finish_save()
        if self.world.preemption is not None:
            self.world.preemption.save_s.pop(self.checkpoints, None)
            self.world.preemption.step_s.clear()
        _settle(self.models, self.settings)
        if self.settings.collect_interval:
            gc.enable()
        if self.states:
            self.states.remove()


class _LossOnLastStage:
    """schedule.run's on_output: Megatron's (loss sum, tokens, report); adds (loss, kl, ce, tokens) of this rank to sums."""

    def __init__(
        self,
        model: Any,
        teacher: Teacher | None,
        settings: DistillConfig | CorrectionConfig,
        world: World,
        vocab_size: int,
    ):
        self.model, self.teacher, self.world, self.vocab_size = model, teacher, world, vocab_size
        self.objective = Objective(
            settings.divergence,
            settings.temperature,
            settings.kl_weight,
            settings.ce_weight,
            DTYPES[settings.logits_precision],
        )
        self.overlap = settings.overlap
        self.sums = torch.zeros(4, dtype=torch.float64, device=world.device)

    def __call__(self, hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict]:
        inner = unwrap(self.model)
        if self.overlap:
            mark_head_gradient_ready(self.model, inner, hidden)
        loss = last_stage_loss(
            hidden,
            output_weight(inner),
            batch,
            self.teacher.target(signal_of(batch)) if self.teacher is not None else None,
            self.objective,
            vocab_size=self.vocab_size,
            group=self.world.groups.tp,
        )
        if self.teacher is not None:
            self.teacher.release(signal_of(batch))
        self.sums += torch.cat([loss.sums, loss.num_tokens[None]]).double()
        # Not divided: with calculate_per_token_loss Megatron divides the gradient by the global
        # number of valid tokens of the step.
        return loss.total, loss.num_tokens.to(torch.int32), {}


def _prepare(chunks: list[Any], settings: TrainingConfig, world: World) -> tuple[list[Any], Any, Any]:
    config = chunks[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=settings.overlap,
        overlap_param_gather=settings.overlap,
    )
    refuse("this model would be trained wrongly:", silently_wrong(config, ddp))
    # Set before wrapping: it also decides how the wrapper scales gradients.
    config.calculate_per_token_loss = True
    models = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0, pg_collection=world.groups)
        for i, chunk in enumerate(chunks)
    ]
    for model in models:
        model.train()
    bf16 = config.params_dtype is torch.bfloat16
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            clip_grad=settings.clip_grad
            or math.inf,  # at 0 Megatron would not compute the norm, which is logged
            bf16=bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=settings.overlap,
        ),
        models,
        use_gloo_process_groups=False,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if settings.overlap:
        config.no_sync_func = [m.no_sync for m in models] if len(models) > 1 else models[0].no_sync
        config.param_sync_func = (
            [m.start_param_sync for m in models] if len(models) > 1 else models[0].start_param_sync
        )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=settings.steps,
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=settings.steps,
        wd_incr_style="constant",
    )
    return models, optimizer, scheduler


def _settle(models: list[Any], settings: TrainingConfig) -> None:
    """Leave the bare weights current (with overlap the last parameter gather is still to come) and the rest collectable."""
    for model in models:
        if settings.overlap:
            model.disable_forward_pre_hook(param_sync=True)
        # Through the optimizer's shards, which hold gradient hooks that Python's collector does not see, these would keep
        # model, optimizer and process groups for the rest of the process.
        config = unwrap(model).config
        config.finalize_model_grads_func = config.grad_scale_func = config.no_sync_func = (
            config.param_sync_func
        ) = None
