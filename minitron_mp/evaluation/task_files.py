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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_mp.data.record_errors import kind_of
from minitron_mp.data.records import read_lines
from minitron_mp.data.text_files import open_text
from minitron_mp.errors import InputError

if TYPE_CHECKING:
    from minitron_mp.data.tokenizer import Tokenizer

KINDS = (
    "text, or query, choices (two or more) and gold, or context_options (two or more), continuation and gold"
)

LISTS = ("choices", "context_options")
"""Fields that must be lists. Items over the keys of an object would give a wrong accuracy."""


@dataclass(frozen=True)
class TaskItem:
    """One item of a task.

    options: (context, ending) of each option. gold: index of the correct option. None: there is one
    option, which is correct if greedy decoding returns it. line: number of its line in the file.
    """

    options: list[tuple[str, str]]
    gold: int | None
    line: int = field(default=0, compare=False)


def read_task_file(path: Path, limit: int | None = None) -> list[TaskItem]:
    """Read the first `limit` items of a file.

    InputError names the first line that is not an item.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}; give a .jsonl file of items (docs/evaluation.md)")
    items: list[TaskItem] = []
    with open_text(path) as file:
        for number, line in enumerate(read_lines(file, path), 1):
            if line.isspace():
                continue
            if limit is not None and len(items) >= limit:
                break
            items.append(_item(line, f"{path} line {number}", number))
            if (items[-1].gold is None) != (items[0].gold is None):
                raise InputError(
                    f"{path} line {number} mixes last-word items and choice items, whose accuracies cannot "
                    "be averaged; give them as two tasks"
                )
    if not items:
        raise InputError(f"{path} contains no task item; each line needs {KINDS}")
    return items


def check_tokens(items: list[TaskItem], tokenizer: Tokenizer, path: Path) -> None:
    """Raise InputError with the line of the first item with a token that has no embedding."""
    if tokenizer.num_embeddings is None:
        return
    for item in items:
        for ids in tokenizer.encode([f"{context} {ending}" for context, ending in item.options]):
            unknown = tokenizer.id_without_embedding(ids)
            if unknown is not None:
                raise InputError(f"{path} line {item.line} {tokenizer.no_embedding(unknown)}")


def _item(line: str, place: str, number: int) -> TaskItem:
    try:
        given = {key: value for key, value in json.loads(line.lstrip("\ufeff")).items() if value is not None}
        _require_lists(given, place)
        item = _parsed(given, number)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        item = None
    if item is None:
        raise InputError(f"{place} is not a task item; it needs {KINDS}; given {line[:80].strip()!r}")
    for option in item.options:
        for text in option:
            _require_unicode(text, place)
    return item


def _require_lists(given: dict[str, Any], place: str) -> None:
    for name in LISTS:
        value = given.get(name, [])
        if isinstance(value, list):
            continue
        advice = "give a list of strings"
        for key, strings in value.items() if isinstance(value, dict) else ():
            if isinstance(strings, list):
                advice += f", for example the list in {name}.{key}"
                break
        raise InputError(f'{place} has {kind_of(value)} in the field "{name}", not a list; {advice}')


def _parsed(given: dict[str, Any], number: int) -> TaskItem | None:
    """Return the item of a line, or None if it is not one. Errors for missing and other fields."""
    if not any(name in given for name in LISTS):
        context, word = given["text"].rstrip().rsplit(maxsplit=1)
        return TaskItem([(context, word)], None, number)
    if "choices" in given:
        options = [(given["query"], choice) for choice in given["choices"]]
    else:
        options = [(context, given["continuation"]) for context in given["context_options"]]
    gold = given["gold"]
    has_text = all(isinstance(part, str) and part.strip() for option in options for part in option)
    is_index = isinstance(gold, int) and not isinstance(gold, bool)
    if is_index and 0 <= gold < len(options) > 1 and has_text:
        return TaskItem(options, gold, number)
    return None


def _require_unicode(text: str, place: str) -> None:
    """Raise InputError if a text has half of a surrogate pair, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place} has half of a surrogate pair (\\u{ord(text[error.start]):04x}) in "
            f"{text[max(0, error.start - 20) : error.start + 20]!r}; write the character in full, or "
            "delete it"
        ) from None
