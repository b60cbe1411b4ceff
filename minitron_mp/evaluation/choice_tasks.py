"""Choice tasks by log-likelihood of the options, and last-word tasks, on the sharded model.

task_files.py describes the files. The score of an option is the sum of log p over the tokens of its
ending. Its normalised score divides that by the number of characters of the ending (acc and
acc_norm of lm-evaluation-harness). A last word is correct if each of its tokens is the most likely
token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel
from torch import Tensor

from minitron_mp.errors import InputError
from minitron_mp.evaluation.log_likelihood import Row, score_rows
from minitron_mp.evaluation.task_files import TaskItem
from minitron_mp.models.sharded_model import ShardedModel

if TYPE_CHECKING:
    from minitron_mp.data.tokenizer import Tokenizer


class TaskResult(BaseModel):
    """Accuracies over num_items, and their standard errors sqrt(p (1 - p) / (n - 1)).

    normalised: None for last-word tasks.
    """

    accuracy: float
    accuracy_stderr: float
    normalised: float | None = None
    normalised_stderr: float | None = None
    num_items: int


def score_task(
    models: Mapping[str, ShardedModel],
    items: list[TaskItem],
    tokenizer: Tokenizer,
    *,
    micro_batch_size: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, TaskResult]:
    """Return the result of each model, equal on every rank. All ranks must call this.

    The beginning of a context that is longer than the model's sequence length is cut off.
    """
    results = {}
    for name, model in models.items():
        rows = rows_of(items, tokenizer, model.sequence_length)
        scores = score_rows(
            model, rows, micro_batch_size=micro_batch_size, eod=tokenizer.eod, progress=progress
        )
        results[name] = result_of(items, scores)
    return results


def rows_of(items: list[TaskItem], tokenizer: Tokenizer, sequence_length: int) -> list[Row]:
    """Return the tokens of each option, in order.

    They begin with the tokenizer's beginning-of-sequence token, if it has one. The beginning of a
    row longer than sequence_length + 1 is cut off.
    """
    first = [] if tokenizer.bos is None else [tokenizer.bos]
    options = [option for item in items for option in item.options]
    texts = tokenizer.encode([f"{context.rstrip()} {ending.lstrip()}" for context, ending in options])
    contexts = tokenizer.encode([context.rstrip() for context, _ in options])
    rows = []
    for text, context in zip(texts, contexts):
        unknown = tokenizer.id_without_embedding(text)
        if unknown is not None:
            raise InputError(f"an item of a task {tokenizer.no_embedding(unknown)}")
        tokens = first + text
        # The first token has no context, so it cannot be scored.
        start = min(max(len(first + context), 1), len(tokens) - 1)
        cut = max(0, len(tokens) - sequence_length - 1)
        rows.append(Row(tokens[cut:], max(1, start - cut)))
    return rows


def result_of(items: list[TaskItem], scores: Tensor) -> TaskResult:
    """Return the accuracies of items from the scores that score_rows() returns for them."""
    num_right, num_right_normalised = 0, 0
    for item, rows in zip(items, _rows_of_items(items)):
        log_p, num_missed = scores[rows, 0], scores[rows, 1]
        if item.gold is None:
            num_right += int(num_missed[0] == 0)
            continue
        characters = torch.tensor([float(len(ending)) for _, ending in item.options])
        num_right += int(log_p.argmax() == item.gold)
        num_right_normalised += int((log_p / characters).argmax() == item.gold)
    n = len(items)
    accuracy = num_right / n
    normalised = None if items[0].gold is None else num_right_normalised / n
    return TaskResult(
        accuracy=accuracy,
        accuracy_stderr=_standard_error(accuracy, n),
        normalised=normalised,
        normalised_stderr=None if normalised is None else _standard_error(normalised, n),
        num_items=n,
    )


def right_log_p(items: list[TaskItem], scores: Tensor) -> float:
    """Return the mean log p of the right options, in nats per item."""
    log_p = [scores[rows][item.gold or 0, 0].item() for item, rows in zip(items, _rows_of_items(items))]
    return sum(log_p) / len(items)


def _standard_error(share: float, n: int) -> float:
    return math.sqrt(share * (1 - share) / max(1, n - 1))


def _rows_of_items(items: list[TaskItem]) -> Iterator[slice]:
    """Yield the rows of each item's options."""
    start = 0
    for item in items:
        yield slice(start, start + len(item.options))
        start += len(item.options)
