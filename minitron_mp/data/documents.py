"""Documents of text files, and the part of each document.

This file imports neither torch nor Megatron.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from minitron_mp.data.sources import STDLIB, Source, Sources
from minitron_mp.errors import InputError

MAX_PIECE = 1 << 20
"""Characters after which a document is cut into pieces."""

MIN_PIECE = 4000
"""Characters of the smallest pieces of a source with few documents."""

MIN_HELD_OUT_DOCUMENTS = 10
"""Smallest expected number of documents of a held-out part. A source with fewer documents is
divided by pieces of documents."""

BATCH_CHARACTERS = 1 << 21
"""Characters that are tokenized together. A tokenizer needs about 150 bytes of memory for each."""


def read_documents(sources: Sources, valid_fraction: float, seed: int) -> Iterator[tuple[str, str]]:
    """Yield (part, text) of every document that is not blank. A document belongs to one part.

    If a source has so few documents that a part might be empty, its documents are cut into pieces
    of a thousandth of the source, and the pieces are divided among the parts.
    """
    for name, source in sources.items():
        by_document = name != "source" or _has_documents(
            source, math.ceil(MIN_HELD_OUT_DOCUMENTS / valid_fraction)
        )
        piece_size = MAX_PIECE if by_document else _small_piece_size(source)
        for file_name, path in source.files:
            for piece, (document, text) in enumerate(_read_pieces(path, piece_size)):
                if not text.strip():
                    continue
                if name in ("source", STDLIB):
                    number = document if by_document else piece
                    yield part_of(f"{seed}:{file_name}:{number}", valid_fraction), text
                else:
                    yield name, text


def part_of(name: str, valid_fraction: float) -> str:
    """Return the part of a document from a hash of its name. It is the same on every machine."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if share < valid_fraction:
        return "calibration"
    return "valid" if share < 2 * valid_fraction else "train"


def next_batch(documents: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the next documents, with at least BATCH_CHARACTERS characters; fewer at the end."""
    batch = []
    length = 0
    for part, text in documents:
        batch.append((part, text))
        length += len(text)
        if length >= BATCH_CHARACTERS:
            break
    return batch


def _small_piece_size(source: Source) -> int:
    num_bytes = sum(path.stat().st_size for _, path in source.files)
    return min(max(MIN_PIECE, num_bytes // 1000), MAX_PIECE)


def _has_documents(source: Source, count: int) -> bool:
    """Return whether the source has at least `count` documents. It reads no more than needed."""
    remaining = count
    for _, path in source.files:
        if path.suffix == ".jsonl":
            with path.open("rb") as file:
                records = (line for line in file if line.strip())
                remaining -= sum(1 for _ in islice(records, remaining))
        else:
            remaining -= 1
        if remaining <= 0:
            return True
    return False


def _read_pieces(path: Path, piece_size: int) -> Iterator[tuple[int, str]]:
    """Yield (number of the document, piece of text) of a file. Most documents have one piece.

    Each record of a .jsonl file is a document. A .py file that is not UTF-8 is skipped.
    """
    try:
        with path.open(encoding="utf-8") as file:
            documents: Iterable[Iterable[str]] = [file]
            if path.suffix == ".jsonl":
                documents = (record.splitlines(keepends=True) for record in _records(file, path))
            for number, lines in enumerate(documents):
                for piece in _pieces(lines, piece_size):
                    yield number, piece
    except UnicodeDecodeError as error:
        if path.suffix != ".py":
            raise InputError(
                f"{path} is not UTF-8 text ({error.reason}); convert it, for example with iconv"
            ) from error


def _records(lines: Iterable[str], path: Path) -> Iterator[str]:
    """Yield the field "text" of each line of a .jsonl file."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text = None
        with suppress(ValueError, KeyError, TypeError):
            text = json.loads(line)["text"]
        if not isinstance(text, str):
            raise InputError(
                f'{path} line {number} is not a JSON object with a string in the field "text": '
                f"{line[:80].strip()!r}; correct or delete the line"
            )
        yield text


def _pieces(lines: Iterable[str], size: int) -> Iterator[str]:
    """Yield pieces of at least `size` characters that end at a blank line.

    After 4 x `size` characters a piece ends at any line.
    """
    piece: list[str] = []
    length = 0
    for line in lines:
        piece.append(line)
        length += len(line)
        if length >= (4 * size if line.strip() else size):
            yield "".join(piece)
            piece = []
            length = 0
    yield "".join(piece)
