"""Loss, perplexity and KL to the teacher on held-out text, on the sharded model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel

from minitron_mp.distillation.last_stage_loss import evaluation_objective, last_stage_loss
from minitron_mp.distillation.teacher import Teacher, signal_of, with_signals
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.schedule import local_batch, run_schedule
from minitron_mp.distributed.world import World
from minitron_mp.losses.fused import TeacherHidden, TeacherTarget
from minitron_mp.models.build import output_weight, unwrap


class Quality(BaseModel):
    """Means over the valid tokens of the held-out text, in nats a token; perplexity = exp(loss). kl is KL(teacher || model)."""

    loss: float
    perplexity: float
    kl: float | None
    num_tokens: int


def compare(
    models: dict[str, list[Any]],
    teacher: Teacher | None,
    steps: Iterable[Sequence[Batch]],
    world: World,
    *,
    vocab_size: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Quality]:
    """Quality of several models and, under "teacher", of the teacher, the same on every rank; reached by all ranks.

    steps: groups of this data parallel rank's microbatches. One group is in flight at a time, so the teacher's signals of one
    group are held, and its forward pass is done once for all models. progress: called after each group.
    """
    names = [*(["teacher"] if teacher else []), *models]
    sums = {name: torch.zeros(3, dtype=torch.float64, device=world.device) for name in names}
    for chunks in models.values():
        for chunk in chunks:
            chunk.eval()

    def add(
        name: str, hidden: torch.Tensor, weight: torch.Tensor, target: TeacherTarget | None, batch: Batch
    ) -> None:
        objective = evaluation_objective(hidden, kl_weight=0.0 if target is None else 1.0)
        loss = last_stage_loss(
            hidden, weight, batch, target, objective, vocab_size=vocab_size, group=world.groups.tp
        )
        parts = [loss.cross_entropy.sum(), loss.divergence.sum(), loss.num_tokens]
        sums[name].add_(torch.stack(parts).double())

    def judge(name: str, hidden: torch.Tensor, batch: Batch) -> None:
        target = teacher.target(signal_of(batch)) if teacher else None
        add(name, hidden, output_weight(unwrap(models[name][-1])), target, batch)

    with torch.no_grad():
        for batches in steps:
            batches = with_signals(teacher, batches)
            for name, chunks in models.items():
                run_schedule(chunks, batches, world, partial(judge, name))
            if teacher and world.is_last_stage:
                for batch in batches:
                    target = teacher.target(signal_of(batch))
                    assert isinstance(target, TeacherHidden), "the teacher's own loss needs its hidden states"
                    add("teacher", target.hidden, target.weight, None, local_batch(batch, world))
            progress()
    return {
        name: _quality(total, world, has_kl=teacher is not None and name != "teacher")
        for name, total in sums.items()
    }


def _quality(sums: torch.Tensor, world: World, *, has_kl: bool) -> Quality:
    dist.all_reduce(sums, group=world.groups.dp_cp)
    dist.all_reduce(sums, group=world.groups.pp)  # the last stage alone has counted
    loss, kl, tokens = sums.tolist()
    loss /= tokens
    return Quality(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        kl=kl / tokens if has_kl else None,
        num_tokens=round(tokens),
    )
