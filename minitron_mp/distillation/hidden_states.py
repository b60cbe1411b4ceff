"""Losses on hidden states inside the models, on all pipeline stages (2407.14679, tables 17 and 18).

    L = L_logits + alpha L_is,   L_is = mean over tokens of sum over pairs of d(W x, t)

    x [s', b, h_s]  state j of the student: input of layer j after its input norm; state num_layers
                    is the output of the final norm
    t [s', b, h_t]  the paired state of the teacher
    d               cosine: 1 - cos; mse: mean over channels of the squared difference
    W [h_t, h_s]    up-projection, one for all pairs; no projection if the widths are equal
    alpha           a number, or L_logits / L_is of the step before (1 in the first step). It is
                    constant within a step. So the split into microbatches does not change a step,
                    and earlier stages do not need the loss of a microbatch from the last stage

A forward hook on the norm that outputs x computes d and its gradient. It passes x through a
function that adds the gradient in the backward pass. So Megatron's schedules need no change.
Megatron divides the gradients of all weights by the step's number of tokens, so this file uses sums
over tokens.

W is not part of the model. It is float32 and equal on all ranks. A separate AdamW updates it with
the learning rate of the step and without clipping. Each rank accumulates the gradient of W over its
tokens and stages. One all-reduce in each step keeps W bitwise equal on all ranks. W is part of the
checkpoints of a run and is not exported.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from minitron_mp.config.training import TrainingConfig
from minitron_mp.distillation.state_capture import state_norm
from minitron_mp.distillation.teacher import Teacher, signal_of
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.losses.tensor_parallel import add_weight_gradient, for_product, product

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's state."""


class _Inputs(NamedTuple):
    """Loss mask [s/cp, b] and the teacher's states [s', b, h_t] of one microbatch."""

    mask: Tensor
    states: Sequence[Tensor]


@dataclass
class _Site:
    """One pair, at the norm that computes the student's state.

    index: of the pair among the pairs of this stage. recomputed: inputs of microbatches whose layer
    runs again in the backward pass, in order.
    """

    index: int
    recomputed: deque[_Inputs] = field(default_factory=deque)


@dataclass
class _Projection:
    """W and its optimizer. weight [h_t, h_s] is float32. A step accumulates its gradient.

    On a GPU the products with bf16 states have bf16 operands, as those of the model's layers, and
    float32 results. They run at about ten times the speed of float32 products. On a CPU, and with
    float32 states, they are float32 products.
    """

    weight: Tensor
    optimizer: torch.optim.AdamW

    @classmethod
    def create(cls, weight: Tensor, settings: TrainingConfig) -> _Projection:
        weight.requires_grad_()
        weight.grad = torch.zeros_like(weight)
        optimizer = torch.optim.AdamW(
            [weight],
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.weight_decay,
        )
        return cls(weight, optimizer)

    @property
    def gradient(self) -> Tensor:
        assert self.weight.grad is not None
        return self.weight.grad

    def of(self, x: Tensor) -> Tensor:
        """Return x W^T float32 [..., h_t] of states x [..., h_s]."""
        rows = x.flatten(0, -2)
        return product(rows, for_product(rows, self._operand(x), torch.float32), torch.float32).view(
            *x.shape[:-1], -1
        )

    def backward(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient of x, and add the gradient of W. gradient [..., h_t]: of of(x)."""
        weight = self._operand(x)
        rows = x.flatten(0, -2).to(weight.dtype)
        grad_rows = gradient.flatten(0, -2).to(weight.dtype)
        add_weight_gradient(self.gradient, grad_rows, rows)
        return torch.mm(grad_rows, weight).view(x.shape)

    def _operand(self, x: Tensor) -> Tensor:
        """Return W in the dtype of the products with x."""
        return self.weight.detach().to(x.dtype) if x.is_cuda else self.weight.detach()

    def step(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        moments = self.optimizer.state[self.weight]
        return {
            "projection": self.weight.detach(),
            **{name: moments[name] if moments else torch.zeros_like(self.weight) for name in MOMENTS},
        }

    def load(self, state: dict[str, Tensor], num_updates: int) -> None:
        self.weight.copy_(state["projection"])
        moments = {name: state[name].to(self.weight.device) for name in MOMENTS}
        self.optimizer.state[self.weight] = {"step": torch.tensor(float(num_updates)), **moments}


class HiddenStatesLoss:
    """The hidden-state loss on the student: hooks on its chunks, L_is, alpha and the projection.

    All ranks must create and use it.
    """

    def __init__(self, models: list[Any], teacher: Teacher | None, settings: TrainingConfig, world: World):
        pairs = teacher.pairs if teacher is not None else None
        if teacher is None or pairs is None:
            raise InputError(
                "distill.states is set, but the teacher delivers no hidden states; "
                "construct the teacher with pairs=LayerPairs(...)"
            )
        self.world = world
        self.teacher = teacher
        self.settings = pairs.settings
        blocks = pairs.blocks(world.parallel).get(world.groups.pp.rank(), [])
        pairs_here = [block - 1 for block in blocks if block]
        # Without sequence parallelism all tensor-parallel ranks have the same tokens, so only one
        # of them adds to the sums.
        self.counts = world.parallel.sequence_parallel or world.groups.tp.rank() == 0
        self.current: _Inputs | None = None
        self.sum = torch.zeros((), dtype=torch.float64, device=world.device)
        alpha = 1.0 if self.settings.weight == "dynamic" else self.settings.weight
        self.alpha = torch.tensor(alpha, dtype=torch.float64, device=world.device)
        weight = pairs.first_projection()
        self.projection = None if weight is None else _Projection.create(weight.to(world.device), settings)
        self.handles = []
        for index, pair in enumerate(pairs_here):
            norm = state_norm(models, pairs.settings.layers[pair][0], pairs.student.num_layers)
            assert norm is not None, f"pair {pair} is not on this stage"
            self.handles.append(norm.register_forward_hook(partial(self._match, _Site(index))))

    def begin(self, batch: Batch) -> None:
        """Store the inputs of a microbatch before a chunk runs it (on_batch of run_schedule())."""
        self.current = _Inputs(batch["loss_mask"], self.teacher.hidden_states(signal_of(batch)))

    def start_step(self) -> None:
        """Clear the sums of the previous step."""
        self.sum.zero_()
        if self.projection is not None:
            self.projection.gradient.zero_()

    def is_finite(self) -> Tensor:
        """Return whether the loss of the step and the gradient of W are finite on this rank."""
        finite = self.sum.isfinite()
        if self.projection is not None:
            finite = finite & self.projection.gradient.isfinite().all()
        return finite

    def skip_step(self) -> None:
        """End a step without an update of projection and alpha."""
        self.current = None

    def end_step(self, logits_loss: Tensor, tokens: Tensor, lr: float) -> None:
        """Update projection and alpha; reached by all ranks.

        logits_loss, tokens: sums over this rank's part of the step. Only one of several ranks with
            the same part passes its sums; the others pass 0.
        """
        self.current = None
        if self.projection is None and self.settings.weight != "dynamic":
            return
        total = torch.stack([logits_loss, self.sum, tokens])
        dist.all_reduce(total)
        if self.projection is not None:
            gradient = self.projection.gradient
            if not self.counts:
                gradient.zero_()
            dist.all_reduce(gradient)
            gradient /= total[2].clamp(min=1)  # no token of the step may count
            self.projection.step(lr)
        if self.settings.weight == "dynamic":  # a student that equals its teacher has no ratio
            self.alpha = torch.where(total[1] > 0, total[0].clamp(min=0) / total[1], self.alpha)

    def state(self) -> dict[str, Any]:
        """Return the sharded state for checkpoints: alpha, the projection and its moments."""
        tensors = {"alpha": self.alpha} | (self.projection.state() if self.projection else {})
        return {
            f"states.{name}": ShardedTensor.from_rank_offsets(
                f"states.{name}", tensor.cpu().clone(), replica_id=dist.get_rank()
            )
            for name, tensor in tensors.items()
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any], num_updates: int) -> None:
        """Restore the result of state(). num_updates: updates done, for Adam."""
        prefix = "states."
        tensors = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        self.alpha = tensors["alpha"].to(self.world.device)
        if self.projection is not None:
            self.projection.load(tensors, num_updates)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def _match(self, site: _Site, _: object, __: object, x: Tensor) -> Tensor | None:
        """Return the output of a norm with the gradient of the loss attached, as a forward hook."""
        if self.current is None:
            return None
        if not torch.is_grad_enabled():
            # With recomputation the layer runs again in the backward pass, with the microbatches in
            # the same order.
            site.recomputed.append(self.current)
            return None
        inputs = site.recomputed.popleft() if site.recomputed else self.current
        tp, mask, t = self.world.groups.tp, inputs.mask, inputs.states[site.index]
        if t.shape[0] != x.shape[0]:  # each tensor-parallel rank has received a part of the tokens
            gathered = t.new_empty((x.shape[0], *t.shape[1:]))
            dist.all_gather_into_tensor(gathered, t.contiguous(), group=tp)
            t = gathered
        if mask.shape[0] != x.shape[0]:
            mask = mask.chunk(tp.size())[tp.rank()]
        hidden = x.detach()
        projected = hidden.float() if self.projection is None else self.projection.of(hidden)
        with torch.enable_grad():
            leaf = projected.requires_grad_()
            total = (distance(leaf, t.float(), self.settings.kind) * mask).sum()
            (gradient,) = torch.autograd.grad(total * self.alpha.float(), leaf)
        if self.counts:
            self.sum += total.detach()
        if self.projection is not None:
            gradient = self.projection.backward(hidden, gradient)
        return _AddGradient.apply(x, gradient.to(x.dtype))


def distance(x: Tensor, t: Tensor, kind: str) -> Tensor:
    """Return the distance [...] of hidden states x and t, float32 [..., h] each."""
    if kind == "mse":
        return (x - t).square().mean(-1)
    # 1 - cos = |x / |x| - t / |t||^2 / 2. If both are equal, this form and its gradient are 0. It
    # is also accurate for small distances.
    return (F.normalize(x, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1) / 2


class _AddGradient(torch.autograd.Function):
    """Return x unchanged. The backward pass adds a given gradient to the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return grad + gradient, None
