"""Loss, perplexity and KL to the teacher on held-out text, on the sharded model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel

from minitron_mp.losses import distillation_loss
from minitron_mp.model import logits, unwrap
from minitron_mp.parallel import World
from minitron_mp.schedule import Batch, run
from minitron_mp.teacher import with_signals


class Quality(BaseModel):
    """Means over the valid tokens of the held-out text, in nats a token; perplexity = exp(loss). kl is KL(teacher || model)."""

    loss: float
    perplexity: float
    kl: float | None
    num_tokens: int


def evaluate(
    chunks: list[Any],
    teacher: Any,
    steps: Sequence[Sequence[Batch]],
    world: World,
    *,
    vocab_size: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Quality:
    """Quality of a model, the same on every rank; reached by all ranks.

    steps: groups of this data parallel rank's microbatches; one group is in flight at a time, so the teacher's signals of one
    group are held. teacher: None leaves kl out. progress: called with the number of tokens done on this rank.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    for chunk in chunks:
        chunk.eval()

    def on_output(hidden: torch.Tensor, batch: Batch) -> None:
        z_t = teacher.logits(batch["teacher"]) if teacher is not None else None
        z_s = logits(unwrap(chunks[-1]), hidden)
        _, kl, ce = distillation_loss(z_s, z_t, batch["labels"], vocab_size=vocab_size, group=world.groups.tp, kl_weight=float(z_t is not None))
        mask = batch["loss_mask"]
        sums.add_(torch.stack([(ce * mask).sum(), (kl * mask).sum(), mask.sum()]).double())

    for batches in steps:
        run(chunks, with_signals(teacher, batches), world, on_output)
        progress(sum(batch["tokens"].numel() for batch in batches))
    dist.all_reduce(sums, group=world.groups.dp_cp)
    dist.all_reduce(sums, group=world.groups.pp)  # the last stage alone has counted
    loss, kl, tokens = sums.tolist()
    return Quality(
        loss=loss / tokens, perplexity=math.exp(min(loss / tokens, 700.0)), kl=kl / tokens if teacher is not None else None, num_tokens=round(tokens)
    )
