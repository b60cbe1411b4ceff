"""Choice tasks by partial scoring, and last words, on the sharded model: which option does the model find most likely?

items.py says what a file of items holds. An option's score is the sum of log p over its ending's tokens; its normalised score divides that by the
ending's characters (acc and
acc_norm of lm-evaluation-harness). A last word counts when each of its tokens is the model's most likely one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel
from torch import Tensor

from minitron_mp.evaluation.log_likelihood import Row, score_rows
from minitron_mp.evaluation.task_files import TaskItem
from minitron_mp.models.sharded_model import ShardedModel

if TYPE_CHECKING:
    from minitron_mp.data.tokenizer import Tokenizer


class TaskResult(BaseModel):
    """Shares of num_items, and their standard errors, sqrt(p (1 - p) / (n - 1)). normalised: None for last words."""

    accuracy: float
    accuracy_stderr: float
    normalised: float | None = None
    normalised_stderr: float | None = None
    num_items: int


def rows_of(items: list[TaskItem], tokenizer: Tokenizer, sequence_length: int) -> list[Row]:
    """One for each option, in order, behind the token with which the tokenizer itself begins a text, where it does.

    What is longer than sequence_length + 1 loses its beginning.
    """
    first = [] if tokenizer.bos is None else [tokenizer.bos]
    texts = [option for item in items for option in item.options]
    whole = tokenizer.encode([f"{context.rstrip()} {ending.lstrip()}" for context, ending in texts])
    before = tokenizer.encode([context.rstrip() for context, _ in texts])
    rows = []
    for all_tokens, context in zip(whole, before):
        all_tokens, context = first + all_tokens, first + context
        start = min(
            max(len(context), 1), len(all_tokens) - 1
        )  # the first token has nothing before it that could make it likely
        cut = max(0, len(all_tokens) - sequence_length - 1)
        rows.append(Row(all_tokens[cut:], max(1, start - cut)))
    return rows


def score_task(
    models: Mapping[str, ShardedModel],
    items: list[TaskItem],
    tokenizer: Tokenizer,
    *,
    micro_batch_size: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, TaskResult]:
    """Results of each model, the same on every rank; reached by all ranks. Contexts longer than the sequence lose their beginning."""
    results = {}
    for name, model in models.items():
        rows = rows_of(items, tokenizer, model.sequence_length)
        scores = score_rows(
            model, rows, micro_batch_size=micro_batch_size, eod=tokenizer.eod, progress=progress
        )
        results[name] = result_of(items, scores)
    return results


def result_of(items: list[TaskItem], scores: Tensor) -> TaskResult:
    """scores: of the items' rows, as score_rows() has them."""
    right, right_normalised = 0, 0
    for item, rows in zip(items, _slices(items)):
        own = scores[rows]
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


def right_log_p(items: list[TaskItem], scores: Tensor) -> float:
    """Mean log p of the right options, in nats an item."""
    return sum(scores[own][item.gold or 0, 0].item() for item, own in zip(items, _slices(items))) / len(items)


def _slices(items: list[TaskItem]) -> Iterator[slice]:
    start = 0
    for item in items:
        yield slice(start, start + len(item.options))
        start += len(item.options)
