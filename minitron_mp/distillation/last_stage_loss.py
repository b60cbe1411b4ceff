"""The loss of a microbatch on the last pipeline stage.

Training, evaluation, layer ablation and Megatron-Bridge all call last_stage_loss().

    s sequence  b microbatch  h hidden  v padded vocabulary
    s' is s/cp, or s/cp/tp under sequence parallelism
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mp.distributed.batch import Batch
from minitron_mp.losses.fused import distillation_loss
from minitron_mp.losses.objective import Objective, TeacherTarget
from minitron_mp.models.sharded_model import output_weight


@dataclass(frozen=True)
class LastStageLoss:
    """Loss of one microbatch on this rank. All tensor-parallel ranks hold the same values.

    total: float32 scalar, the sum over tokens that is optimised. Only total is differentiable.
    per_token: float32 [3, s/cp, b], (loss, divergence, cross-entropy) times the loss mask, in nats.
    num_tokens: float32 scalar, valid tokens of this rank.

    The values are sums, not means. Megatron divides the gradient by the global number of valid
    tokens of the step (calculate_per_token_loss). Reports divide global sums.
    """

    total: Tensor
    per_token: Tensor
    num_tokens: Tensor

    @property
    def sums(self) -> Tensor:
        """float32 [3]: loss, divergence and cross-entropy, summed over this rank's tokens."""
        return self.per_token.sum((1, 2))

    @property
    def divergence(self) -> Tensor:
        """float32 [s/cp, b]."""
        return self.per_token[1]

    @property
    def cross_entropy(self) -> Tensor:
        """float32 [s/cp, b]."""
        return self.per_token[2]


def last_stage_loss(
    hidden: Tensor,
    weight: Tensor,
    batch: Batch,
    target: TeacherTarget | None,
    objective: Objective,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
) -> LastStageLoss:
    """Return the distillation loss of one microbatch.

    All ranks of the tensor-parallel group must call it.

    hidden [s', b, h]: output of the final norm.
    weight [v/tp, h]: weight of the output layer.
    batch: a local batch of run_schedule(), with labels and loss_mask [s/cp, b].
    target: the teacher's target. None: cross-entropy alone.

    The returned statistics are new tensors, so Megatron's schedule may divide them in place.
    """
    mask = batch["loss_mask"]
    total, per_token = distillation_loss(
        hidden, weight, batch["labels"], mask, target, objective, vocab_size=vocab_size, group=group
    )
    return LastStageLoss(total, per_token * mask, mask.sum())


def evaluation_objective(hidden: Tensor, *, kl_weight: float) -> Objective:
    """Return the objective of evaluation: forward KL and cross-entropy.

    A CPU has no fast matrix product from bf16 to float32, so on a CPU the logits have the dtype of
    the model, and the KL of a bf16 model has the precision of bf16.
    """
    on_cpu = hidden.device.type == "cpu"
    return Objective(kl_weight=kl_weight, logits_dtype=hidden.dtype if on_cpu else torch.float32)


def mark_head_gradient_ready(wrapper: Any, model: Any, hidden: Tensor) -> None:
    """Let Megatron's data-parallel wrapper reduce the output layer's gradient when it is complete.

    Overlapped gradient reduction needs it: the loss adds the gradient to main_grad, so autograd
    runs no hook on the weight, and the wrapper would wait for its bucket. For a tied head on the
    stage of the embedding the function does nothing, because the later gradient of the embedding
    runs the hook.

    wrapper: DistributedDataParallel around `model`, a GPTModel.
    hidden: output of the model on the last stage.
    """
    if model.share_embeddings_and_output_weights and model.pre_process:
        return
    weight = output_weight(model)
    hidden.register_hook(lambda _: wrapper.param_to_bucket_group[weight].register_grad_ready(weight))
