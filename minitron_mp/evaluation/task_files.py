"""Items of choice tasks and of last words in files of the user. Imports no torch: a recipe is checked in a second.

A file is JSON lines, all of one of three kinds, as many public sets are, converted:

    {"query": "...", "choices": ["...", "..."], "gold": 0}                PIQA, ARC, COPA, OpenBookQA: one context, several endings
    {"context_options": ["...", "..."], "continuation": "...", "gold": 0}  Winogrande: several contexts, one ending (arXiv 1806.02847)
    {"text": "... last"}                                                   LAMBADA: the last word, by greedy decoding
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from minitron_mp.errors import InputError


@dataclass(frozen=True)
class TaskItem:
    """options: (context, ending) each. gold: the right one; None: the only one, to be found by greedy decoding."""

    options: list[tuple[str, str]]
    gold: int | None


def read_task_file(path: Path, limit: int | None = None) -> list[TaskItem]:
    """The first `limit` items of a file; InputError names the line that is none."""
    if not path.is_file():
        raise InputError(
            f"there is no file {path}; give a .jsonl of items (docs/evaluation.md says of which kinds)"
        )
    items = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip() and (limit is None or len(items) < limit):
                items.append(_item(line, f"{path} line {number}"))
                if (items[-1].gold is None) != (items[0].gold is None):
                    raise InputError(
                        f"{path} line {number}: last words and choices in one file, whose shares mean different things; give them as two tasks"
                    )
    if not items:
        raise InputError(f"{path} holds no item")
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
        if (
            isinstance(gold, int)
            and 0 <= gold < len(options) > 1
            and all(isinstance(part, str) and part.strip() for option in options for part in option)
        ):
            return TaskItem(options, gold)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    kinds = "text, or query, choices (two or more) and gold, or context_options (two or more), continuation and gold"
    raise InputError(f"{where} is no item: needs {kinds}; given {line[:80].strip()!r}")
