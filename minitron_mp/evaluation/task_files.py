"""Task files of the user: choice tasks and last-word tasks.

This module does not import torch, so a recipe is checked quickly. A file has JSON lines, all of one
of these kinds. Many public data sets can be converted to one of them:

    {"query": "...", "choices": ["...", "..."], "gold": 0}
        PIQA, ARC, COPA, OpenBookQA: one context, several endings
    {"context_options": ["...", "..."], "continuation": "...", "gold": 0}
        Winogrande: several contexts, one ending (arXiv 1806.02847)
    {"text": "... last"}
        LAMBADA: the last word, by greedy decoding
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from minitron_mp.errors import InputError

KINDS = (
    "text, or query, choices (two or more) and gold, or context_options (two or more), continuation and gold"
)


@dataclass(frozen=True)
class TaskItem:
    """One item of a task.

    options: (context, ending) of each option. gold: index of the correct option. None: there is one
    option, which is correct if greedy decoding returns it.
    """

    options: list[tuple[str, str]]
    gold: int | None


def read_task_file(path: Path, limit: int | None = None) -> list[TaskItem]:
    """Read the first `limit` items of a file.

    InputError names the first line that is not an item.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}; give a .jsonl file of items (docs/evaluation.md)")
    items: list[TaskItem] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip() or (limit is not None and len(items) >= limit):
                continue
            items.append(_item(line, f"{path} line {number}"))
            if (items[-1].gold is None) != (items[0].gold is None):
                raise InputError(
                    f"{path} line {number} mixes last-word items and choice items, whose accuracies cannot "
                    "be averaged; give them as two tasks"
                )
    if not items:
        raise InputError(f"{path} contains no task item; each line needs {KINDS}")
    return items


def _item(line: str, where: str) -> TaskItem:
    try:
        given = json.loads(line)
        if "text" in given:
            context, word = given["text"].rstrip().rsplit(maxsplit=1)
            return TaskItem([(context, word)], None)
        if "choices" in given:
            options = [(given["query"], choice) for choice in given["choices"]]
        else:
            options = [(context, given["continuation"]) for context in given["context_options"]]
        gold = given["gold"]
        has_text = all(isinstance(part, str) and part.strip() for option in options for part in option)
        if isinstance(gold, int) and 0 <= gold < len(options) > 1 and has_text:
            return TaskItem(options, gold)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{where} is not a task item; it needs {KINDS}; given {line[:80].strip()!r}")
