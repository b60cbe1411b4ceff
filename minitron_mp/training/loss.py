"""The loss of a training run on the last pipeline stage, with its sums over a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.distillation.last_stage_loss import last_stage_loss, mark_head_gradient_ready
from minitron_mp.distillation.teacher import Teacher, signal_of
from minitron_mp.distributed.batch import Batch
from minitron_mp.losses.fused import Objective
from minitron_mp.models.sharded_model import DTYPES, ShardedModel, output_weight, unwrap


class TrainingLoss:
    """The on_output function of run_schedule() in training.

    model: model with chunks that are wrapped for data parallelism. sums: float64 [4], the sums of
    loss, divergence and cross-entropy in nats, and of valid tokens, over this rank's microbatches
    of a step.
    """

    def __init__(
        self, model: ShardedModel, teacher: Teacher | None, settings: DistillConfig | CorrectionConfig
    ):
        self.model, self.teacher, self.overlap = model, teacher, settings.overlap
        self.objective = Objective(
            settings.divergence,
            settings.temperature,
            settings.kl_weight,
            settings.ce_weight,
            DTYPES[settings.logits_precision],
            settings.divergence_parameters or {},
        )
        self.sums = torch.zeros(4, dtype=torch.float64, device=model.world.device)

    def __call__(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return Megatron's (loss summed over tokens, number of tokens, report)."""
        wrapper = self.model.last_chunk
        inner = unwrap(wrapper)
        if self.overlap:
            mark_head_gradient_ready(wrapper, inner, hidden)
        loss = last_stage_loss(
            hidden,
            output_weight(inner),
            batch,
            self.teacher.target(signal_of(batch)) if self.teacher is not None else None,
            self.objective,
            vocab_size=self.model.arch.vocab_size,
            group=self.model.world.groups.tp,
        )
        if self.teacher is not None:
            self.teacher.release(signal_of(batch))
        self.sums += torch.cat([loss.sums, loss.num_tokens[None]]).double()
        # Return the sum, because with calculate_per_token_loss Megatron divides the gradient by the
        # global number of valid tokens of the step.
        return loss.total, loss.num_tokens.to(torch.int32), {}
