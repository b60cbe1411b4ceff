"""What the sharded model says of rows of tokens: log p of their last part, and the token that it finds most likely next.

Choice tasks (tasks.py), depth importance by task accuracy (ablation.py) and the adapter of lm-evaluation-harness (harness.py) rest on this.
Rows are shared out over data parallel ranks in an order by length, so that alike lengths are padded together, and results are added up
once at the end. The vocabulary stays sharded: four numbers a position cross tensor parallel ranks.

    s' as schedule.run says   b microbatch   v padded vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.schedule import run_schedule
from minitron_mp.distributed.world import World
from minitron_mp.losses.fused import float32_logits
from minitron_mp.models.build import output_weight, unwrap


@dataclass(frozen=True)
class Row:
    """tokens, of which those from `start` (at least 1) on are asked for."""

    tokens: list[int]
    start: int


def score_rows(
    chunks: list[Any],
    rows: Sequence[Row],
    world: World,
    *,
    micro_batch_size: int,
    vocab_size: int,
    eod: int,
    progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """float64 [rows, 2] on the CPU of every rank: log p of the asked tokens in nats, and how many of them are not the most likely one.

    progress: called after each of num_groups() groups. Reached by all ranks with the same rows.
    """

    def judge(hidden: Tensor, batch: Batch) -> Tensor:
        return span_sums(chunks[-1], hidden, batch, world, vocab_size)

    return _over(chunks, rows, world, 2, judge, micro_batch_size, eod, progress)


def next_tokens(
    chunks: list[Any],
    sequences: Sequence[Sequence[int]],
    world: World,
    *,
    micro_batch_size: int,
    vocab_size: int,
    eod: int,
    progress: Callable[[], None] = lambda: None,
) -> list[int]:
    """The most likely token after each sequence (of one token or more), on every rank; of equals the lowest. Reached by all ranks."""

    def judge(hidden: Tensor, batch: Batch) -> Tensor:
        _, best = _at_labels(chunks[-1], hidden, batch, world, vocab_size)
        return (best * (batch["loss_mask"] > 0)).sum(0).double()[:, None]

    rows = [Row([*tokens, eod], len(tokens)) for tokens in sequences]
    return _over(chunks, rows, world, 1, judge, micro_batch_size, eod, progress)[:, 0].long().tolist()


def _over(
    chunks: list[Any],
    rows: Sequence[Row],
    world: World,
    columns: int,
    judge: Callable[[Tensor, Batch], Tensor],
    micro_batch_size: int,
    eod: int,
    progress: Callable[[], None],
) -> Tensor:
    """[rows, columns]: what judge(hidden, batch) [b, columns] says of each row, added up over the ranks."""
    found = torch.zeros((len(rows), columns), dtype=torch.float64, device=world.device)
    for chunk in chunks:
        chunk.eval()
    for batches in row_batches(rows, world, micro_batch_size, eod):
        run_schedule(
            chunks,
            batches,
            world,
            lambda hidden, batch: found.index_add_(0, batch["rows"].to(world.device), judge(hidden, batch)),
        )
        progress()
    return summed(found, world).cpu()


def summed(found: Tensor, world: World) -> Tensor:
    """Sums of all samples on every rank, in place; found: of this rank's part of them, 0 but on the last stage."""
    dist.all_reduce(found, group=world.groups.dp_cp)
    dist.all_reduce(found, group=world.groups.pp)
    return found


def num_groups(num_rows: int, world: World, micro_batch_size: int) -> int:
    return -(-num_rows // _unit(world, micro_batch_size))


def _unit(world: World, micro_batch_size: int) -> int:
    return micro_batch_size * world.groups.dp.size() * world.parallel.interleaved


def row_batches(rows: Sequence[Row], world: World, micro_batch_size: int, eod: int) -> Iterator[list[Batch]]:
    """This data parallel rank's microbatches, in groups that fill the pipeline; all of a group are as long as the longest row in it.

    loss_mask marks the positions that predict the asked tokens; "rows" [b] are the rows' numbers. Longest rows first.
    """
    p, dp, unit = world.parallel, world.groups.dp, _unit(world, micro_batch_size)
    multiple = p.sequence_multiple
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].tokens))
    for first in range(0, len(rows), unit):
        length = -(-(len(rows[order[first]].tokens) - 1) // multiple) * multiple
        starts = range(first + dp.rank() * micro_batch_size, first + unit, micro_batch_size * dp.size())
        yield [
            _batch(rows, order[start : start + micro_batch_size], micro_batch_size, length, eod)
            for start in starts
        ]


def _batch(rows: Sequence[Row], numbers: list[int], size: int, length: int, eod: int) -> Batch:
    """These rows, filled up with eod to `length`, and with empty ones of no weight to `size`."""
    tokens, mask = torch.full((size, length + 1), eod), torch.zeros((size, length))
    for i, number in enumerate(numbers):
        row = rows[number]
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        mask[i, row.start - 1 : len(row.tokens) - 1] = 1  # position p predicts token p + 1
    numbers = numbers + [0] * (size - len(numbers))
    positions = torch.arange(length).expand(size, length).contiguous()
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": positions,
        "loss_mask": mask,
    }
    return cast(Batch, batch | {"rows": torch.tensor(numbers)})


def span_sums(model: Any, hidden: Tensor, batch: Batch, world: World, vocab_size: int) -> Tensor:
    """float64 [b, 2] of this context parallel rank's part of a microbatch: sum of log p of the masked labels, number of those not most likely."""
    log_p, best = _at_labels(model, hidden, batch, world, vocab_size)
    both = torch.stack([log_p, (best != batch["labels"]).float()], -1)
    return torch.where(batch["loss_mask"][..., None] > 0, both, 0.0).sum(0).double()


def _at_labels(
    model: Any, hidden: Tensor, batch: Batch, world: World, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """log p of the label, float32, and the most likely token, int64, at each position, [s/cp, b]; the same on every tensor parallel rank."""
    labels, tp, weight = batch["labels"], world.groups.tp, output_weight(unwrap(model))
    first, rest, parts = tp.rank() * len(weight), labels.reshape(-1), []
    for z in float32_logits(hidden, weight, labels.shape[0], tp):
        own, rest = rest[: len(z)] - first, rest[len(z) :]
        z[:, max(0, vocab_size - first) :] = -torch.inf
        here = (own >= 0) & (own < z.shape[1])
        at_label = torch.where(here, z.gather(1, own.clamp(0, z.shape[1] - 1)[:, None])[:, 0], -torch.inf)
        peak, place = z.max(1)
        parts.append(
            torch.stack([at_label, torch.logsumexp(z, 1), peak, (place + first).float()], 1)
        )  # exact: ids are far below 2^24
    local = torch.cat(parts)  # [s b, 4]
    every = local.new_empty((tp.size(), *local.shape))
    dist.all_gather_into_tensor(every.view(-1, 4), local, group=tp)
    at_label, normaliser = every[..., 0].amax(0), torch.logsumexp(every[..., 1], 0)
    best = every[..., 3].gather(0, every[..., 2].argmax(0, keepdim=True))[0].long()
    return (at_label - normaliser).view(labels.shape), best.view(labels.shape)
