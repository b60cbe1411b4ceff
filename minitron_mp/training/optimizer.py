"""TrainableModel: data-parallel wrapper, distributed optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from minitron_mp.artifacts.checkpoint import model_state, scaling_state
from minitron_mp.artifacts.optimizer_state import (
    empty_optimizer_state,
    load_optimizer_state,
    optimizer_parts,
    optimizer_state,
)
from minitron_mp.config.training import TrainingConfig
from minitron_mp.distributed.launcher import environment_variable
from minitron_mp.errors import refuse
from minitron_mp.models.precision import silently_wrong
from minitron_mp.models.sharded_model import DTYPES, ShardedModel, unwrap


class TrainableModel:
    """A model with gradients, optimizer and learning-rate schedule.

    model: model whose chunks are wrapped in Megatron's DistributedDataParallel. num_updates: steps
    whose gradients were applied; a step with a non-finite gradient has no update. All ranks must
    call every method.
    """

    def __init__(self, model: ShardedModel, settings: TrainingConfig):
        self.overlap = settings.overlap
        self.model = _wrapped(model, settings)
        self.optimizer = _optimizer(self.model.chunks, settings)
        self.schedule = learning_rate_schedule(self.optimizer, settings)
        self.num_updates = 0
        _connect(self.model.chunks, self.optimizer, settings)

    def zero_grad(self) -> None:
        """Clear the gradients of the last step."""
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def next_lr(self) -> float:
        """Set the learning rate of the step and return it."""
        self.schedule.step(increment=1)
        lr: float = self.optimizer.param_groups[0]["lr"]
        return lr

    def gradient_norm(self) -> float:
        """Return the norm of the gradients before clipping, equal on all ranks.

        It copies the gradients to the main gradients, which apply() uses.
        """
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def apply(self, gradient_norm: float) -> None:
        """Clip the gradients and update weights and moments.

        gradient_norm() and apply() are the parts of Megatron's optimizer.step(). They are separate
        because Megatron would apply a gradient that is not finite.
        """
        for part in optimizer_parts(self.optimizer):
            parameters = part.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(
                    parameters,
                    max_norm=part.config.clip_grad,
                    total_norm=gradient_norm,
                    use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                )
        self.optimizer.step_with_ready_grads()
        self.num_updates += 1

    def state_dict(self, *, empty: bool = False) -> dict[str, Any]:
        """Return the sharded state of weights and optimizer.

        empty: return uninitialised optimizer tensors, to read a checkpoint into.
        """
        chunks = [chunk.module for chunk in self.model.chunks]
        with nullcontext() if empty else self.gathered():
            weights = model_state(chunks, self.model.world)
            make_state = empty_optimizer_state if empty else optimizer_state
            state = {**weights, **make_state(self.optimizer, weights)}
            state |= scaling_state(chunks, self.model.world)
            state["num_updates"] = self.num_updates
        return state

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Context between two steps in which every rank has the updated parameters.

        With overlap the all-gather of the updated parameters runs only in the next step.
        """
        if not self.overlap:
            yield
            return
        config = unwrap(self.model.chunks[0]).config
        start_gather, config.param_sync_func = config.param_sync_func, None
        for chunk in self.model.chunks:
            chunk.disable_forward_pre_hook(param_sync=True)
        yield
        for chunk in self.model.chunks:
            chunk.enable_forward_pre_hook()
        config.param_sync_func = start_gather

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Restore a state_dict(empty=True) that a checkpoint has filled."""
        self.num_updates = state.get("num_updates", step)  # older checkpoints: no step was skipped
        # Transformer Engine 2.16 rejects pickled histories of delayed scaling by default. These
        # come from a checkpoint of this run.
        with environment_variable("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1"):
            for i, chunk in enumerate(self.model.chunks):
                weights = state[f"model{i}"] | state.get(f"scaling{i}", {})
                chunk.module.load_state_dict(weights, strict=False)
        load_optimizer_state(self.optimizer, state, num_updates=self.num_updates)
        self.schedule.step(increment=step)

    def finalize(self) -> None:
        """Run the pending all-gather of parameters; delete references that keep memory alive."""
        for chunk in self.model.chunks:
            if self.overlap:
                chunk.disable_forward_pre_hook(param_sync=True)
            # The optimizer's shards hold gradient hooks that Python's garbage collector cannot
            # trace. With them these functions would keep model, optimizer and process groups in
            # memory until the process ends.
            config = unwrap(chunk).config
            config.finalize_model_grads_func = None
            config.grad_scale_func = None
            config.no_sync_func = None
            config.param_sync_func = None


def _wrapped(model: ShardedModel, settings: TrainingConfig) -> ShardedModel:
    config = model.chunks[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=settings.gradient_precision == "fp32",  # otherwise in the model's precision
        use_distributed_optimizer=True,
        overlap_grad_reduce=settings.overlap,
        overlap_param_gather=settings.overlap,
    )
    refuse("this model would be trained wrongly; change its config:", silently_wrong(config, ddp))
    # Set it before wrapping, because the wrapper's scaling of gradients depends on it.
    config.calculate_per_token_loss = True
    chunks = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0, pg_collection=model.world.groups)
        for i, chunk in enumerate(model.chunks)
    ]
    for chunk in chunks:
        chunk.train()
    return model.with_chunks(chunks)


def _optimizer(chunks: list[Any], settings: TrainingConfig) -> Any:
    config = chunks[0].config
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            # With 0 Megatron would not compute the gradient norm, which the log needs.
            clip_grad=settings.clip_grad or math.inf,
            bf16=config.params_dtype is torch.bfloat16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=settings.overlap,
            **_optimizer_precision(settings),
        ),
        chunks,
        use_gloo_process_groups=False,
    )


def _optimizer_precision(settings: TrainingConfig) -> dict[str, Any]:
    """Return Megatron's settings of an optimizer with moments in bf16, {} for moments in float32.

    They are stored by Transformer Engine's Adam, which also holds the float32 weights then.
    """
    if settings.moment_precision == "fp32":
        return {}
    moments = DTYPES[settings.moment_precision]
    return {
        "use_precision_aware_optimizer": True,
        "main_grads_dtype": DTYPES[settings.gradient_precision],
        "exp_avg_dtype": moments,
        "exp_avg_sq_dtype": moments,
        # Otherwise Adam would store the 16 bits that the bf16 weights lack. Our checkpoints hold the
        # float32 weights.
        "store_param_remainders": False,
    }


def _connect(chunks: list[Any], optimizer: Any, settings: TrainingConfig) -> None:
    """Set the functions of wrapper and optimizer that Megatron's schedules call."""
    config = unwrap(chunks[0]).config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if not settings.overlap:
        return
    if len(chunks) > 1:
        config.no_sync_func = [chunk.no_sync for chunk in chunks]
        config.param_sync_func = [chunk.start_param_sync for chunk in chunks]
    else:
        config.no_sync_func = chunks[0].no_sync
        config.param_sync_func = chunks[0].start_param_sync


def learning_rate_schedule(optimizer: Any, settings: TrainingConfig) -> OptimizerParamScheduler:
    """Return the schedule of learning rate and weight decay. settings.schedule describes it."""
    is_wsd = settings.schedule == "wsd"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=settings.steps,
        lr_decay_style="WSD" if is_wsd else settings.schedule,
        wsd_decay_steps=settings.decay_steps,
        lr_wsd_decay_style=settings.decay_shape if is_wsd else None,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=settings.steps,
        wd_incr_style="constant",
    )
