"""Choice tasks by partial scoring, and last words, on the sharded model: which option does the model find most likely?

A file is JSON lines of one of three kinds, as many public sets are, converted:

    {"query": "...", "choices": ["...", "..."], "gold": 0}                PIQA, ARC, COPA, OpenBookQA: one context, several endings
    {"context_options": ["...", "..."], "continuation": "...", "gold": 0}  Winogrande: several contexts, one ending (arXiv 1806.02847)
    {"text": "... last"}                                                   LAMBADA: the last word, by greedy decoding

An option's score is the sum of log p over its ending's tokens; its normalised score divides that by the ending's characters (acc and
acc_norm of lm-evaluation-harness). A last word counts when each of its tokens is the model's most likely one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor

from minitron_mp.config import InputError
from minitron_mp.losses import float32_logits
from minitron_mp.model import output_weight, unwrap
from minitron_mp.parallel import World
from minitron_mp.schedule import Batch, run

if TYPE_CHECKING:
    from minitron_mp.data import Tokenizer


@dataclass(frozen=True)
class Item:
    """options: (context, ending) each. gold: the right one; None: the only one, to be found by greedy decoding."""

    options: list[tuple[str, str]]
    gold: int | None


class TaskResult(BaseModel):
    """Shares of num_items, and their standard errors, sqrt(p (1 - p) / (n - 1)). normalised: None for last words."""

    accuracy: float
    accuracy_stderr: float
    normalised: float | None = None
    normalised_stderr: float | None = None
    num_items: int


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """The first `limit` items of a file; InputError names the line that is none."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; give a .jsonl of items (tasks.py says which kinds)")
    items = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip() and (limit is None or len(items) < limit):
                items.append(_item(line, f"{path} line {number}"))
    if not items:
        raise InputError(f"{path} holds no item")
    return items


def _item(line: str, where: str) -> Item:
    try:
        given = json.loads(line)
        if "text" in given:
            context, word = given["text"].rstrip().rsplit(maxsplit=1)
            return Item([(context, word)], None)
        if "choices" in given:
            options = [(given["query"], choice) for choice in given["choices"]]
        else:
            options = [(context, given["continuation"]) for context in given["context_options"]]
        gold = given["gold"]
        if isinstance(gold, int) and 0 <= gold < len(options) and all(isinstance(part, str) and part.strip() for option in options for part in option):
            return Item(options, gold)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{where} is no item: needs text, or query, choices and gold, or context_options, continuation and gold; given {line[:80].strip()!r}")


@dataclass(frozen=True)
class _Row:
    """One option as tokens. start: of the ending."""

    tokens: list[int]
    start: int


def _rows(items: list[Item], tokenizer: Tokenizer, sequence_length: int) -> list[_Row]:
    """One for each option, in order. What is longer than sequence_length + 1 loses its beginning."""
    texts = [option for item in items for option in item.options]
    whole = tokenizer.encode([f"{context.rstrip()} {ending.lstrip()}" for context, ending in texts])
    before = tokenizer.encode([context.rstrip() for context, _ in texts])
    rows = []
    for all_tokens, context in zip(whole, before):
        start = min(max(len(context), 1), len(all_tokens) - 1)  # the first token has nothing before it that could make it likely
        cut = max(0, len(all_tokens) - sequence_length - 1)
        rows.append(_Row(all_tokens[cut:], max(1, start - cut)))
    return rows


def judge(
    models: dict[str, list[Any]],
    items: list[Item],
    tokenizer: Tokenizer,
    world: World,
    *,
    sequence_length: int,
    micro_batch_size: int,
    vocab_size: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, TaskResult]:
    """Results of each model, the same on every rank; reached by all ranks. Contexts longer than the sequence lose their beginning."""
    rows = _rows(items, tokenizer, sequence_length)
    return {
        name: _result(items, _scores(chunks, rows, world, sequence_length, micro_batch_size, vocab_size, tokenizer.eod, progress))
        for name, chunks in models.items()
    }


def _scores(
    chunks: list[Any], rows: list[_Row], world: World, length: int, micro_batch_size: int, vocab_size: int, eod: int, progress: Callable[[], None]
) -> Tensor:
    """[rows, 2] on the CPU: log p of the ending, and how many of its tokens are not the most likely one."""
    dp, groups = world.groups.dp, world.groups
    found = torch.zeros((len(rows), 2), dtype=torch.float64, device=world.device)
    for chunk in chunks:
        chunk.eval()

    def add(hidden: Tensor, batch: Batch) -> None:
        found.index_add_(0, batch["rows"].to(world.device), _of_endings(chunks[-1], hidden, batch, world, vocab_size))

    p, unit = world.parallel, micro_batch_size * dp.size() * world.parallel.interleaved
    multiple = (2 * p.cp if p.cp > 1 else 1) * p.tp
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].tokens))  # alike lengths together: padding costs as much as text
    with torch.no_grad():
        for first in range(0, len(rows), unit):
            longest = len(rows[order[first]].tokens) - 1
            padded = min(length, -(-longest // multiple) * multiple)
            starts = range(first + dp.rank() * micro_batch_size, first + unit, micro_batch_size * dp.size())
            run(chunks, [_batch(rows, order[start : start + micro_batch_size], micro_batch_size, padded, eod) for start in starts], world, add)
            progress()
    dist.all_reduce(found, group=groups.dp_cp)
    dist.all_reduce(found, group=groups.pp)  # the last stage alone has counted
    return found.cpu()


def _batch(rows: list[_Row], numbers: list[int], size: int, length: int, eod: int) -> Batch:
    """These rows, filled up with eod to `length`, and with empty ones of no weight to `size`."""
    tokens, mask = torch.full((size, length + 1), eod), torch.zeros((size, length))
    for i, number in enumerate(numbers):
        row = rows[number]
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        mask[i, row.start - 1 : len(row.tokens) - 1] = 1  # position p predicts token p + 1
    numbers = numbers + [0] * (size - len(numbers))
    positions = torch.arange(length).expand(size, length).contiguous()
    batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "position_ids": positions, "loss_mask": mask}
    return batch | {"rows": torch.tensor(numbers)}


def _of_endings(model: Any, hidden: Tensor, batch: Batch, world: World, vocab_size: int) -> Tensor:
    """[b, 2] of this context parallel rank's part of a microbatch: sum of log p of the masked labels, number of those not most likely."""
    labels, mask, tp = batch["labels"], batch["loss_mask"], world.groups.tp
    weight = output_weight(unwrap(model))
    first, rest, parts = tp.rank() * len(weight), labels.reshape(-1), []
    for z in float32_logits(hidden, weight, labels.shape[0], tp):
        own, rest = rest[: len(z)] - first, rest[len(z) :]
        z[:, max(0, vocab_size - first) :] = -torch.inf
        here = (own >= 0) & (own < z.shape[1])
        at_label = torch.where(here, z.gather(1, own.clamp(0, z.shape[1] - 1)[:, None])[:, 0], -torch.inf)
        peak = z.amax(1)
        parts.append(torch.stack([at_label, peak, torch.logsumexp(z, 1)], 1))
    local = torch.cat(parts)  # [s b, 3]
    every = local.new_empty((tp.size(), *local.shape))
    dist.all_gather_into_tensor(every.view(-1, 3), local, group=tp)
    at_label, peak = every[..., 0].amax(0), every[..., 1].amax(0)
    log_p, missed = at_label - torch.logsumexp(every[..., 2], 0), at_label < peak
    shaped = torch.stack([log_p, missed.float()], -1).view(*labels.shape, 2)
    return torch.where(mask[..., None] > 0, shaped, 0.0).sum(0).double()


def _result(items: list[Item], scores: Tensor) -> TaskResult:
    right, right_normalised, row = 0, 0, iter(_slices(items))
    for item in items:
        own = scores[next(row)]
        if item.gold is None:
            right += int(own[0, 1] == 0)
            continue
        characters = torch.tensor([float(len(ending)) for _, ending in item.options])
        right += int(own[:, 0].argmax() == item.gold)
        right_normalised += int((own[:, 0] / characters).argmax() == item.gold)
    n, greedy = len(items), items[0].gold is None

    def error(share: float) -> float:
        return math.sqrt(share * (1 - share) / max(1, n - 1))

    accuracy, normalised = right / n, None if greedy else right_normalised / n
    return TaskResult(
        accuracy=accuracy,
        accuracy_stderr=error(accuracy),
        normalised=normalised,
        normalised_stderr=None if normalised is None else error(normalised),
        num_items=n,
    )


def _slices(items: list[Item]) -> Iterator[slice]:
    start = 0
    for item in items:
        yield slice(start, start + len(item.options))
        start += len(item.options)
