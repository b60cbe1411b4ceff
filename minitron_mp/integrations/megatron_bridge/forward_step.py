"""KDForwardStep: the forward step of Bridge's pretrain() that distils a student from a teacher.

s sequence  b microbatch  s' is s/cp, or s/cp/tp under sequence parallelism
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from minitron_mp.distillation.last_stage_loss import last_stage_loss, mark_head_gradient_ready
from minitron_mp.distillation.teacher import TeacherSignal
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.schedule import local_batch
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError, refuse
from minitron_mp.integrations.megatron_bridge.model import (
    bare_model,
    has_float16_module,
    world_of_provider,
)
from minitron_mp.integrations.megatron_bridge.teacher import BridgeTeacher
from minitron_mp.losses.objective import Objective
from minitron_mp.models.precision import silently_wrong
from minitron_mp.models.sharded_model import output_weight


class KDForwardStep:
    """Forward step and callback of pretrain(cfg, step, callbacks=[step]).

    The model returns hidden states, and losses.fused.distillation_loss applies the output layer in
    tiles of tokens, vocabulary-parallel. The model's cross-entropy does not run. Bridge logs
    "kd loss" (the optimised loss), the divergence under its own name ("forward_kl") and "lm loss",
    as means over tokens. The teacher is loaded when training starts and freed after the last
    evaluation.

    vocab_size: without padding. objective: default Objective(), forward KL alone.
    """

    def __init__(self, teacher: BridgeTeacher, *, vocab_size: int, objective: Objective | None = None):
        self.teacher, self.vocab_size = teacher, vocab_size
        self.objective = objective or Objective()
        if not self.objective.kl_weight and not self.objective.ce_weight:
            raise InputError("kl_weight and ce_weight of the objective are both 0; set one of them above 0")
        self.world: World | None = None
        self.trained = False

    def __call__(
        self, state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False
    ) -> tuple[Tensor, Callable]:
        """Return (output, loss function). Bridge binds the first argument, its GlobalState."""
        if self.world is None:
            raise InputError(
                "KDForwardStep must also be passed as a callback: pretrain(cfg, step, callbacks=[step])"
            )
        assert not return_schedule_plan, (
            "a schedule plan is for the overlap of expert communication; check_config() rejects experts"
        )
        world = self.world
        batch: Batch = {}
        if world.is_first_stage or world.is_last_stage:  # Bridge reads no data on other stages
            batch = _local_batch(next(data_iterator), world)
        signal = self.teacher.signal(batch, bare_model(model))
        # Float16Module would cast the hidden states to float32.
        options = {"fp32_output": False} if has_float16_module(model) else {}
        output = model(batch.get("tokens"), batch.get("position_ids"), None, **options)
        check_nan = state.cfg.rerun_state_machine.check_for_nan_in_loss
        return output, partial(self._loss, model=model, batch=batch, signal=signal, check_nan=check_nan)

    def _loss(
        self, output: Tensor, *, model: Any, batch: Batch, signal: TeacherSignal | None, check_nan: bool
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (loss sum, tokens, {name: [sum, tokens]}) of a microbatch on the last stage.

        Bridge sums over the ranks and divides. Without a signal (evaluation beside a remote
        teacher) the loss is the cross-entropy.
        """
        assert self.world is not None
        student, hidden = bare_model(model), output.transpose(0, 1)
        if torch.is_grad_enabled() and model.ddp_config.overlap_grad_reduce:
            mark_head_gradient_ready(model, student, hidden)
        objective = self.objective
        if signal is None:
            objective = Objective(kl_weight=0.0, ce_weight=1.0, logits_dtype=objective.logits_dtype)
        loss = last_stage_loss(
            hidden,
            output_weight(student),
            batch,
            None if signal is None else self.teacher.target(signal),
            objective,
            vocab_size=self.vocab_size,
            group=self.world.groups.tp,
        )
        if signal is not None:
            self.teacher.release(signal)
        if check_nan and not torch.isfinite(loss.total):
            raise InputError(
                f"the loss is {loss.total.item()} on {self.world.coordinates}; "
                "lower the learning rate, or use params_dtype float32"
            )
        sums = dict(zip(("kd loss", objective.divergence, "lm loss"), loss.sums))
        if signal is None:
            sums = {"lm loss": sums["lm loss"]}
        tokens = loss.num_tokens
        report = {name: torch.stack([value, tokens.to(value.dtype)]) for name, value in sums.items()}
        return loss.total, tokens.to(torch.int32), report

    # Bridge's callback manager calls the methods with the names of its events.
    def on_train_start(self, context: Any) -> None:
        # check_config() cannot check these settings, because Bridge derives them later.
        problems = [
            text
            for chunk in context.model
            if hasattr(chunk, "ddp_config")
            for text in silently_wrong(chunk.config, chunk.ddp_config)
        ]
        refuse("this model would be trained wrongly; change its config:", list(dict.fromkeys(problems)))
        self.world = world_of_provider(context.model)
        self.teacher.start(self.world, context.state.cfg.model.seq_length)

    def on_train_step_end(self, context: Any) -> None:
        self.teacher.end_step()

    def on_eval_step_end(self, context: Any) -> None:
        self.teacher.end_step()

    def on_test_step_end(self, context: Any) -> None:
        self.teacher.end_step()

    def on_train_end(self, context: Any) -> None:
        self.trained = True
        if not (context.state.train_state.do_valid or context.state.train_state.do_test):
            self.teacher.close()

    def on_eval_end(self, context: Any) -> None:
        if self.trained and not context.state.train_state.do_test:
            self.teacher.close()

    def on_test_end(self, context: Any) -> None:
        self.teacher.close()


def _local_batch(raw: dict[str, Any], world: World) -> Batch:
    """Return this rank's part of a microbatch of Bridge's data loader."""
    if raw.get("cu_seqlens") is not None or raw.get("cu_seqlens_q") is not None:
        raise InputError(
            "the data set packs several sequences into one (cu_seqlens); disable packing in cfg.dataset"
        )
    keys = ("tokens", "labels", "loss_mask", "position_ids")
    return local_batch(cast(Batch, {key: raw[key] for key in keys}), world)
