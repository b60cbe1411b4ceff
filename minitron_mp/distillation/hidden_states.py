"""Losses on states inside the models (2407.14679, tables 17 and 18), across pipeline stages, without a change of the schedules.

    L = L_logits + alpha L_is,   L_is = mean over tokens of sum over pairs of d(W x, t)

    x [s', b, h_s]   state j of the student: what layer j is given after its input norm; num_layers: the output after the final norm
    t [s', b, h_t]   the teacher's state that it is paired with
    d                cosine: 1 - cos; mse: mean over channels of the squared difference
    W [h_t, h_s]     up-projection, one for all pairs; where the widths are equal there is none
    alpha            a number, or L_logits / L_is of the step before (1 in the first): a constant of the step, so that a step does not depend
                     on its microbatches; the ratio of a microbatch is not known on the stages before the last

A forward hook on the norm that makes x computes d and its gradient, and passes x on through a function that adds the gradient in the
backward pass. Megatron divides the gradients of all weights by the step's number of tokens, so these are sums over tokens.

W is no part of the model: float32, the same on every rank, with an AdamW of its own at the learning rate of the step, without
clipping. Each rank's gradient is added over the tokens and stages that it has; one all-reduce a step makes the update, and so W,
bitwise the same everywhere. It is in the checkpoints of a run and is not exported.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from minitron_mp.config import recipe as config
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.training import TrainingConfig
from minitron_mp.distributed.schedule import Batch
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import unwrap


@dataclass(frozen=True)
class LayerPairs:
    """States of two models of given sizes. InputError when they have no such states.

    channels [h_s]: of the teacher, from which each of the student's was cut: W begins with a one for each of them, else with ones
    on its diagonal.
    """

    settings: config.States
    student: Arch
    teacher: Arch
    channels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        refuse(
            "these states cannot be matched:",
            self.settings.problems(self.student.num_layers, self.teacher.num_layers),
        )

    def blocks(self, parallel: ParallelConfig) -> dict[int, list[int]]:
        """config.States.blocks of this student."""
        return self.settings.blocks(self.student.num_layers, parallel)

    def routes(self, parallel: ParallelConfig, targets: dict[int, list[int]]) -> list[tuple[int, int, int]]:
        """(state of the teacher, stage of the teacher that makes it, stage that wants it) of each pair; targets: as blocks() gives them."""
        wanted_on = {block - 1: stage for stage, blocks in targets.items() for block in blocks}
        made_on = [
            parallel.place_of_state(state, self.teacher.num_layers)[0] for _, state in self.settings.layers
        ]
        return [
            (state, made_on[number], wanted_on[number])
            for number, (_, state) in enumerate(self.settings.layers)
        ]

    def first_projection(self) -> Tensor | None:
        """W [h_t, h_s] at the start, float32; None where the widths are equal."""
        wide, narrow = self.teacher.hidden_size, self.student.hidden_size
        if wide == narrow:
            return None
        weight = torch.eye(wide, narrow)
        if self.channels is not None:
            weight = torch.zeros(wide, narrow)
            weight[list(self.channels), range(narrow)] = 1.0
        return weight


class HiddenStateCapture:
    """Keeps the states of a frozen teacher's microbatches, and hands them to the pipeline stages that want them."""

    def __init__(
        self, chunks: list[Any], world: World, routes: Sequence[tuple[int, int, int]], num_layers: int
    ):
        self.world, self.routes, self.config = world, routes, chunks[0].config
        self.kept: dict[int, list[Tensor]] = {}
        for state in {state for state, *_ in routes}:
            if (norm := _norm(chunks, state, num_layers)) is not None:
                self.kept[state] = kept = []
                norm.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output))

    def forget(self) -> None:
        """Drop what has been kept."""
        for kept in self.kept.values():
            kept.clear()

    def take(self, batches: Sequence[Batch]) -> list[list[Tensor]]:
        """For each microbatch run since the last call or forget(): the states [s', b, h_t] that this stage wants, in order of the pairs.

        Reached by all ranks of the pipeline; one message a pair whose stages differ.
        """
        group, p, (b, s) = self.world.groups.pp, self.world.parallel, batches[0]["tokens"].shape
        shape = len(batches), s // p.cp // (p.tp if p.sequence_parallel else 1), b, self.config.hidden_size
        arrived, transfers = [], []
        for state, source, target in self.routes:
            if group.rank() == source:
                whole = torch.stack(self.kept[state])
            elif group.rank() == target:
                whole = torch.empty(shape, dtype=self.config.params_dtype, device=self.world.device)
            if group.rank() == target:
                arrived.append(whole)
            if source != target and group.rank() in (source, target):
                act, peer = (dist.isend, target) if group.rank() == source else (dist.irecv, source)
                transfers.append(dist.P2POp(act, whole, dist.get_global_rank(group, peer), group))
        for work in dist.batch_isend_irecv(transfers) if transfers else []:
            work.wait()
        self.forget()
        return [[whole[i] for whole in arrived] for i in range(len(batches))]


@dataclass
class _Site:
    """The pair of one norm. recomputed: microbatches whose layer runs again in the backward pass, in order."""

    number: int
    recomputed: deque[tuple[Tensor, Tensor]] = field(default_factory=deque)


class HiddenStatesLoss:
    """The student's side in training: hooks on its chunks, L_is of the step, alpha and the projection. Made and used by all ranks."""

    def __init__(self, models: list[Any], teacher: Any, settings: TrainingConfig, world: World):
        pairs: LayerPairs | None = getattr(teacher, "pairs", None)
        if pairs is None:
            raise InputError(
                "distill.states is given, and the teacher makes no states; make it with pairs=states.Pairs(...)"
            )
        self.pairs, self.world, self.teacher, self.settings = pairs, world, teacher, pairs.settings
        p, depth = world.parallel, pairs.student.num_layers
        here = [block - 1 for block in pairs.blocks(p).get(world.groups.pp.rank(), []) if block]
        self.places = {number: place for place, number in enumerate(here)}
        self.counts = (
            p.sequence_parallel or world.groups.tp.rank() == 0
        )  # else all tensor parallel ranks have the same tokens
        self.current: tuple[Tensor, list[Tensor]] | None = None
        self.sum = torch.zeros((), dtype=torch.float64, device=world.device)
        first = 1.0 if self.settings.weight == "dynamic" else self.settings.weight
        self.alpha = torch.tensor(first, dtype=torch.float64, device=world.device)
        weight = pairs.first_projection()
        self.weight = None if weight is None else weight.to(world.device).requires_grad_()
        self.optimizer: torch.optim.Optimizer | None = None
        if self.weight is not None:
            self.weight.grad = torch.zeros_like(self.weight)
            options = {
                "betas": (settings.adam_beta1, settings.adam_beta2),
                "weight_decay": settings.weight_decay,
            }
            self.optimizer = torch.optim.AdamW([self.weight], lr=settings.lr, **options)
        self.handles = []
        for number in here:
            norm = _norm(models, pairs.settings.layers[number][0], depth)
            assert norm is not None, f"pair {number} is not on this stage"
            site = _Site(number)
            self.handles.append(
                norm.register_forward_hook(lambda _, __, output, site=site: self._match(site, output))
            )

    def begin(self, batch: Batch) -> None:
        """Before a chunk runs a microbatch (schedule.run's on_batch)."""
        self.current = batch["loss_mask"], self.teacher.states(batch["teacher"])

    def start_step(self) -> None:
        self.sum.zero_()
        if self.weight is not None:
            self.weight.grad.zero_()

    def end_step(self, logits_loss: Tensor, tokens: Tensor, lr: float) -> None:
        """Update projection and alpha. logits_loss, tokens: sums over this rank's part of the step, 0 where another rank has the same."""
        self.current = None
        if self.weight is None and self.settings.weight != "dynamic":
            return
        total = torch.stack([logits_loss, self.sum, tokens])
        dist.all_reduce(total)
        if self.weight is not None:
            if not self.counts:
                self.weight.grad.zero_()
            dist.all_reduce(self.weight.grad)
            self.weight.grad /= total[2]
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
        if self.settings.weight == "dynamic":  # a student that is its teacher has no ratio
            self.alpha = torch.where(total[1] > 0, total[0].clamp(min=0) / total[1], self.alpha)

    def state(self) -> dict[str, Any]:
        """Sharded state for checkpoint.save() and load(): alpha, the projection and its moments."""
        tensors = {"alpha": self.alpha}
        if self.weight is not None:
            moments = self.optimizer.state[self.weight] or {
                name: torch.zeros_like(self.weight) for name in ("exp_avg", "exp_avg_sq")
            }
            tensors |= {
                "projection": self.weight.detach(),
                "exp_avg": moments["exp_avg"],
                "exp_avg_sq": moments["exp_avg_sq"],
            }
        key = "states.{}".format
        return {
            key(name): ShardedTensor.from_rank_offsets(
                key(name), tensor.cpu().clone(), replica_id=dist.get_rank()
            )
            for name, tensor in tensors.items()
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any], step: int) -> None:
        """Take back what state() gave; step: Adam's count of steps done."""
        self.alpha = state["states.alpha"].to(self.world.device)
        if self.weight is not None:
            self.weight.copy_(state["states.projection"])
            moments = {
                name: state[f"states.{name}"].to(self.world.device) for name in ("exp_avg", "exp_avg_sq")
            }
            self.optimizer.state[self.weight] = {"step": torch.tensor(float(step)), **moments}

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def _match(self, site: _Site, x: Tensor) -> Tensor | None:
        """The hook on a norm of the student: its output, with the gradient of the loss on it to be added."""
        if self.current is None:
            return None
        now = self.current[0], self.current[1][self.places[site.number]]
        if (
            not torch.is_grad_enabled()
        ):  # the layer runs again in the backward pass, microbatches in the same order
            site.recomputed.append(now)
            return None
        mask, t = site.recomputed.popleft() if site.recomputed else now
        tp = self.world.groups.tp
        if t.shape[0] != x.shape[0]:  # streamed to each tensor parallel rank in part, and wanted whole
            whole = t.new_empty((x.shape[0], *t.shape[1:]))
            dist.all_gather_into_tensor(whole, t.contiguous(), group=tp)
            t = whole
        if mask.shape[0] != x.shape[0]:
            mask = mask.chunk(tp.size())[tp.rank()]
        with torch.enable_grad():
            own = x.detach().float().requires_grad_()
            total = (
                distance(own if self.weight is None else own @ self.weight.t(), t.float(), self.settings.kind)
                * mask
            ).sum()
            gradient, *of_weight = torch.autograd.grad(
                total * self.alpha.float(), [own] if self.weight is None else [own, self.weight]
            )
        if self.counts:
            self.sum += total.detach()
        if of_weight:
            self.weight.grad += of_weight[0]
        return _AddGradient.apply(x, gradient.to(x.dtype))


def distance(x: Tensor, t: Tensor, kind: str) -> Tensor:
    """[..., h] twice, float32 -> [...]."""
    if kind == "mse":
        return (x - t).square().mean(-1)
    # 1 - cos = |x / |x| - t / |t||^2 / 2, which is 0 with gradient 0 where they are equal, and keeps its digits near there.
    return (F.normalize(x, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1) / 2


class _AddGradient(torch.autograd.Function):
    """x as it is; in the backward pass its gradient and the one given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return grad + gradient, None


def _norm(chunks: list[Any], state: int, num_layers: int) -> Any:
    """The module on this rank that makes a state; None when another stage has it."""
    for chunk in map(unwrap, chunks):
        blocks = {block.layer_number - 1: block.input_layernorm for block in chunk.decoder.layers}
        norm = blocks.get(state) if state < num_layers else chunk.decoder.final_layernorm
        if isinstance(norm, IdentityOp):
            raise InputError(
                f"layer {state} has its norm inside a linear layer (Megatron's own Transformer Engine spec); states need a model of build_model()"
            )
        if norm is not None:
            return norm
    return None
