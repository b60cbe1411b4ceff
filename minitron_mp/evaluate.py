"""Loss, perplexity and KL to the teacher on held-out text, on the sharded model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel

from minitron_mp.losses import distillation_loss
from minitron_mp.model import logits, unwrap
from minitron_mp.parallel import World
from minitron_mp.schedule import Batch, local_batch, run
from minitron_mp.teacher import with_signals


class Quality(BaseModel):
    """Means over the valid tokens of the held-out text, in nats a token; perplexity = exp(loss). kl is KL(teacher || model)."""

    loss: float
    perplexity: float
    kl: float | None
    num_tokens: int


def evaluate(chunks: list[Any], teacher: Any, steps: Iterable[Sequence[Batch]], world: World, *, vocab_size: int) -> Quality:
    """Quality of one model, the same on every rank; teacher None leaves kl out. See compare()."""
    return compare({"model": chunks}, teacher, steps, world, vocab_size=vocab_size)["model"]


def compare(
    models: dict[str, list[Any]],
    teacher: Any,
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

    def add(name: str, z: torch.Tensor, z_t: torch.Tensor | None, batch: Batch) -> None:
        _, kl, ce = distillation_loss(z, z_t, batch["labels"], vocab_size=vocab_size, group=world.groups.tp, kl_weight=float(z_t is not None))
        mask = batch["loss_mask"]
        sums[name].add_(torch.stack([(ce * mask).sum(), (kl * mask).sum(), mask.sum()]).double())

    def judge(name: str, hidden: torch.Tensor, batch: Batch) -> None:
        add(name, logits(unwrap(models[name][-1]), hidden), teacher.logits(batch["teacher"]) if teacher else None, batch)

    with torch.no_grad():
        for batches in steps:
            batches = with_signals(teacher, batches)
            for name, chunks in models.items():
                run(chunks, batches, world, partial(judge, name))
            if teacher and world.is_last_stage:
                for batch in batches:
                    add("teacher", teacher.logits(batch["teacher"]), None, local_batch(batch, world))
            progress()
    return {name: _quality(total, world, has_kl=teacher is not None and name != "teacher") for name, total in sums.items()}


def _quality(sums: torch.Tensor, world: World, *, has_kl: bool) -> Quality:
    dist.all_reduce(sums, group=world.groups.dp_cp)
    dist.all_reduce(sums, group=world.groups.pp)  # the last stage alone has counted
    loss, kl, tokens = sums.tolist()
    loss /= tokens
    return Quality(loss=loss, perplexity=math.exp(min(loss, 700.0)), kl=kl / tokens if has_kl else None, num_tokens=round(tokens))
