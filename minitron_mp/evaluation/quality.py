"""Loss, perplexity and KL to the teacher on held-out text, on sharded models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor

from minitron_mp.distillation.last_stage_loss import evaluation_objective, last_stage_loss
from minitron_mp.distillation.teacher import Teacher, signal_of, with_signals
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.schedule import local_batch
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.losses.objective import TeacherHidden, TeacherTarget
from minitron_mp.models.sharded_model import ShardedModel, output_weight, unwrap


class Quality(BaseModel):
    """Means over the valid tokens of the held-out text, in nats per token.

    perplexity is exp(loss), kl is KL(teacher || model). kl is None without a teacher, and for the
    teacher.
    """

    loss: float
    perplexity: float
    kl: float | None
    num_tokens: int


def evaluate(model: ShardedModel, batches: Sequence[Batch], teacher: Teacher | None = None) -> Quality:
    """Measure one model on this data-parallel rank's microbatches.

    The result is equal on every rank. All ranks call this with the same number of batches.
    teacher: for the KL.
    """
    return compare({"model": model}, teacher, [batches])["model"]


def compare(
    models: Mapping[str, ShardedModel],
    teacher: Teacher | None,
    groups: Iterable[Sequence[Batch]],
    *,
    progress: Callable[[], None] = lambda: None,
    measure_teacher: bool = True,
) -> dict[str, Quality]:
    """Measure models of one world and, under "teacher", the teacher.

    The result is equal on every rank. All ranks must call this.

    groups: this data-parallel rank's microbatches, in groups. The teacher's forward pass of a
    group serves all models, and its signals are held for one group at a time. progress: called
    after each group. measure_teacher: whether to measure the teacher, too. It needs the teacher's
    hidden states on these ranks.
    """
    first = next(iter(models.values()))
    world, vocab_size = first.world, first.arch.vocab_size
    names = ["teacher", *models] if teacher and measure_teacher else [*models]
    sums = {name: torch.zeros(3, dtype=torch.float64, device=world.device) for name in names}
    for model in models.values():
        model.eval()

    def add(name: str, hidden: Tensor, weight: Tensor, target: TeacherTarget | None, batch: Batch) -> None:
        objective = evaluation_objective(hidden, kl_weight=0.0 if target is None else 1.0)
        loss = last_stage_loss(
            hidden, weight, batch, target, objective, vocab_size=vocab_size, group=world.groups.tp
        )
        parts = [loss.cross_entropy.sum(), loss.divergence.sum(), loss.num_tokens]
        sums[name].add_(torch.stack(parts).double())

    def measure(name: str, hidden: Tensor, batch: Batch) -> None:
        target = teacher.target(signal_of(batch)) if teacher else None
        add(name, hidden, output_weight(unwrap(models[name].last_chunk)), target, batch)

    with torch.no_grad():
        for number, group in enumerate(groups):
            batches = with_signals(teacher, group, number)
            for name, model in models.items():
                model.forward(batches, partial(measure, name))
            if teacher and measure_teacher and world.is_last_stage:
                for batch in batches:
                    target = teacher.target(signal_of(batch))
                    assert isinstance(target, TeacherHidden), (
                        "the loss of the teacher needs its hidden states"
                    )
                    add("teacher", target.hidden, target.weight, None, local_batch(batch, world))
            progress()
    return {
        name: _quality(total, world, has_kl=teacher is not None and name != "teacher")
        for name, total in sums.items()
    }


def _quality(sums: Tensor, world: World, *, has_kl: bool) -> Quality:
    """Turn the sums of cross-entropy, KL and tokens of this rank into global means.

    All ranks must call this.
    """
    dist.all_reduce(sums, group=world.groups.dp_cp)
    dist.all_reduce(sums, group=world.groups.pp)  # only the last stage has nonzero sums
    loss, kl, tokens = sums.tolist()
    if not tokens:
        raise InputError(
            "the held-out samples have no token that counts in the loss; read more samples "
            "(evaluate.num_samples, valid_batches), or give other text"
        )
    loss /= tokens
    return Quality(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        kl=kl / tokens if has_kl else None,
        num_tokens=round(tokens),
    )
