"""Log-likelihood of rows of tokens on the sharded model, and the most likely next token.

Choice tasks (choice_tasks.py), depth importance by task accuracy (pruning/ablation.py) and the
adapter of lm-evaluation-harness (integrations/lm_eval) use this. Rows are distributed over the
data-parallel ranks in order of length, so that rows of similar length are padded together, and
results are summed once at the end. The vocabulary stays sharded: four numbers per position are
exchanged between tensor-parallel ranks.

    s sequence   s' as in run_schedule()   b microbatch   v padded vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.world import World
from minitron_mp.losses.fused import float32_logits
from minitron_mp.models.sharded_model import ShardedModel, output_weight, unwrap

LENGTH_STEP = 64
"""On a GPU padded lengths are multiples of this number of tokens."""


@dataclass(frozen=True)
class Row:
    """A row of tokens. The tokens from index `start` (at least 1) on are scored."""

    tokens: list[int]
    start: int


def score_rows(
    model: ShardedModel,
    rows: Sequence[Row],
    *,
    micro_batch_size: int,
    eod: int,
    progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the log-likelihoods of rows, float64 [rows, 2] on the CPU of every rank.

    The columns are log p of the scored tokens in nats, and how many of them are not the most likely
    token. progress: called after each of num_groups() groups. All ranks call this with the same
    rows.
    """

    def measure(hidden: Tensor, batch: Batch) -> Tensor:
        return span_sums(model.last_chunk, hidden, batch, model.world, model.arch.vocab_size)

    groups = row_batches(rows, model.world, micro_batch_size, eod)
    return _sum_rows(model, groups, measure, progress, shape=(len(rows), 2))


def next_tokens(
    model: ShardedModel,
    sequences: Sequence[Sequence[int]],
    *,
    micro_batch_size: int,
    eod: int,
    progress: Callable[[], None] = lambda: None,
) -> list[int]:
    """Return the most likely token after each sequence, equal on every rank.

    A tie returns the lowest token. All ranks call this with the same sequences.
    """

    def measure(hidden: Tensor, batch: Batch) -> Tensor:
        _, best = _at_labels(model.last_chunk, hidden, batch, model.world, model.arch.vocab_size)
        return (best * (batch["loss_mask"] > 0)).sum(0).double()[:, None]

    rows = [Row([*tokens, eod], len(tokens)) for tokens in sequences]
    groups = row_batches(rows, model.world, micro_batch_size, eod)
    tokens = _sum_rows(model, groups, measure, progress, shape=(len(rows), 1))
    return tokens[:, 0].long().tolist()


def _sum_rows(
    model: ShardedModel,
    groups: Iterable[Sequence[Batch]],
    measure: Callable[[Tensor, Batch], Tensor],
    progress: Callable[[], None],
    *,
    shape: tuple[int, int],
) -> Tensor:
    """Return the sums over all ranks of measure(hidden, batch) [b, columns], for each row.

    Shape: [rows, columns].
    """
    world = model.world
    sums = torch.zeros(shape, dtype=torch.float64, device=world.device)

    def add(hidden: Tensor, batch: Batch) -> None:
        sums.index_add_(0, batch["rows"], measure(hidden, batch))

    model.eval()
    for batches in groups:
        model.forward(batches, add)
        progress()
    return summed(sums, world).cpu()


def summed(sums: Tensor, world: World) -> Tensor:
    """Add the sums of all ranks in place and return them, on every rank.

    sums: over this rank's part of the samples, zero except on the last pipeline stage.
    """
    dist.all_reduce(sums, group=world.groups.dp_cp)
    dist.all_reduce(sums, group=world.groups.pp)
    return sums


def num_groups(num_rows: int, world: World, micro_batch_size: int) -> int:
    """Return the number of groups of row_batches()."""
    return -(-num_rows // _rows_per_group(world, micro_batch_size))


def _rows_per_group(world: World, micro_batch_size: int) -> int:
    return micro_batch_size * world.groups.dp.size() * world.parallel.interleaved


def row_batches(rows: Sequence[Row], world: World, micro_batch_size: int, eod: int) -> Iterator[list[Batch]]:
    """Yield this data-parallel rank's microbatches in groups that fill the pipeline.

    All microbatches of a group have the padded length of its longest row. loss_mask marks the
    positions that predict scored tokens, and "rows" [b] holds the numbers of the rows.
    """
    dp, rows_per_group = world.groups.dp, _rows_per_group(world, micro_batch_size)
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].tokens))
    for first in range(0, len(rows), rows_per_group):
        length = padded_length(len(rows[order[first]].tokens) - 1, world.parallel, world.device)
        starts = range(
            first + dp.rank() * micro_batch_size, first + rows_per_group, micro_batch_size * dp.size()
        )
        yield [
            _batch(rows, order[start : start + micro_batch_size], micro_batch_size, length, eod)
            for start in starts
        ]


def padded_length(length: int, parallel: ParallelConfig, device: torch.device) -> int:
    """Return the length that rows of `length` tokens are padded to. Causal attention ignores padding.

    The layout needs a multiple of parallel.sequence_multiple. On a GPU there are also few different
    lengths, because Megatron-Core's fused functions are compiled for each, which takes seconds:
    multiples of 64 up to 512, then four lengths per power of two (640, 768, 896, 1024, 1280, ...).
    That adds at most 25 % above 256 tokens. They are multiples of 8 tokens per rank, too, as the
    rows of FP8 products must be.
    """
    multiple = parallel.sequence_multiple
    if device.type == "cuda":
        octave = 1 << max(0, length - 1).bit_length()  # the power of two from `length` on
        multiple = math.lcm(8 * multiple, max(LENGTH_STEP, octave // 8))
    return -(-length // multiple) * multiple


def _batch(rows: Sequence[Row], numbers: list[int], size: int, length: int, eod: int) -> Batch:
    """Return rows as a microbatch, padded with eod to `length`, with empty rows to `size`."""
    tokens, mask = torch.full((size, length + 1), eod), torch.zeros((size, length))
    for i, number in enumerate(numbers):
        row = rows[number]
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        mask[i, row.start - 1 : len(row.tokens) - 1] = 1  # position p predicts token p + 1
    num_padding = size - len(numbers)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": torch.arange(length).expand(size, length).contiguous(),
        "loss_mask": mask,
        "rows": torch.tensor(numbers + [0] * num_padding),
    }


def span_sums(chunk: Any, hidden: Tensor, batch: Batch, world: World, vocab_size: int) -> Tensor:
    """Return sums, float64 [b, 2], over this context-parallel rank's part of a microbatch.

    The columns are the sum of log p of the masked labels, and how many of them are not the most
    likely token. chunk: the model's last chunk, on the last stage.
    """
    log_p, best = _at_labels(chunk, hidden, batch, world, vocab_size)
    both = torch.stack([log_p, (best != batch["labels"]).float()], -1)
    return torch.where(batch["loss_mask"][..., None] > 0, both, 0.0).sum(0).double()


def _at_labels(
    chunk: Any, hidden: Tensor, batch: Batch, world: World, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Return label log p (float32) and most likely token (int64) at each position, [s/cp, b].

    Equal on every tensor-parallel rank.
    """
    labels, tp, weight = batch["labels"], world.groups.tp, output_weight(unwrap(chunk))
    first = tp.rank() * len(weight)  # first token of this rank's vocabulary shard
    remaining, parts = labels.reshape(-1), []
    for z in float32_logits(hidden, weight, labels.shape[0], tp):  # [tokens of a tile, v/tp]
        local_labels, remaining = remaining[: len(z)] - first, remaining[len(z) :]
        z[:, max(0, vocab_size - first) :] = -torch.inf
        is_here = (local_labels >= 0) & (local_labels < z.shape[1])
        label_logits = z.gather(1, local_labels.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
        at_label = torch.where(is_here, label_logits, -torch.inf)
        peak, index = z.max(1)
        # token ids are exact in float32, far below 2^24
        parts.append(torch.stack([at_label, torch.logsumexp(z, 1), peak, (index + first).float()], 1))
    local = torch.cat(parts)  # [s b, 4]
    ranks = local.new_empty((tp.size(), *local.shape))
    dist.all_gather_into_tensor(ranks.view(-1, 4), local, group=tp)
    at_label, normaliser = ranks[..., 0].amax(0), torch.logsumexp(ranks[..., 1], 0)
    best = ranks[..., 3].gather(0, ranks[..., 2].argmax(0, keepdim=True))[0].long()
    return (at_label - normaliser).view(labels.shape), best.view(labels.shape)
