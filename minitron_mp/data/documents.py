"""Documents of text files, and the part of each document.

This file imports neither torch nor Megatron.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from minitron_mp.data import unused
from minitron_mp.data.record_fields import Fields
from minitron_mp.data.records import read_records
from minitron_mp.data.sources import Source, Sources, TextFile
from minitron_mp.data.text_files import (
    CHUNK_BYTES,
    NotText,
    format_of,
    open_bytes,
    open_text,
    reading,
    unpacked_name,
)
from minitron_mp.data.unused import UnusedText

MAX_PIECE = 1 << 20
"""Characters after which a document is cut into pieces."""

MIN_PIECE = 4000
"""Characters of the smallest pieces of a source with few documents."""

LONG_LINE = 4
"""A piece ends at a blank line after its size, at any line end after LONG_LINE times its size, and
within a line that is longer than this."""

MIN_HELD_OUT_DOCUMENTS = 10
"""Smallest expected number of documents of a held-out part. A source with fewer documents is
divided by pieces of documents."""

BATCH_CHARACTERS = 1 << 21
"""Characters that are tokenized together. A tokenizer needs about 150 bytes of memory for each."""

JOINERS = "\u200d\ufe0e\ufe0f"
"""Characters that join their neighbours: zero-width joiner and variation selectors."""


class Document(NamedTuple):
    """A document, or a piece of one, with the part of the text that it belongs to."""

    part: str
    text: str
    path: Path
    line: int
    """Number of its first line (of its row in a table), from 1."""
    is_chat: bool = False
    """Whether the text is the JSON text of a chat (chats.py)."""

    def place_of(self, words: str) -> str:
        """Return the file and line of words in the text, or of the document."""
        file_format = format_of(self.path.name) or "text"
        if file_format == "table":
            return f"{self.path} row {self.line}"
        line = self.line
        if file_format == "text":
            line += self.text.count("\n", 0, max(0, self.text.find(words)))
        return f"{self.path} line {line}"


class Piece(NamedTuple):
    """A piece of a document. Most documents have one piece, and a chat always has."""

    document: int
    """Number of the document in its file, from 0."""
    line: int
    text: str
    is_chat: bool = False


class SplitRule(NamedTuple):
    """How the documents of a source are divided among the parts."""

    by_document: bool
    """Whether a document belongs to one part. Otherwise its pieces are divided."""
    piece_size: int
    """Characters after which a document is cut into pieces."""


@dataclass(frozen=True)
class TextSettings:
    """The settings of the recipe from which documents and their parts follow."""

    valid_fraction: float
    seed: int
    fields: Fields
    """Fields of records."""


def split_rule(name: str, source: Source, settings: TextSettings) -> SplitRule:
    """Return how the documents of a source are divided.

    If the source has so few documents that a part might be empty, its documents are cut into pieces
    of a thousandth of the source, and the pieces are divided among the parts.
    """
    num_documents = math.ceil(MIN_HELD_OUT_DOCUMENTS / settings.valid_fraction)
    if name != "source" or _has_documents(source, num_documents, settings.fields):
        return SplitRule(True, MAX_PIECE)
    return SplitRule(False, _small_piece_size(source, settings.fields))


def read_documents(sources: Sources, settings: TextSettings, not_used: UnusedText) -> Iterator[Document]:
    """Yield every document of all text files that is not blank.

    Text that is skipped or changed is added to not_used.
    """
    for name, source in sources.items():
        rule = split_rule(name, source, settings)
        for file_name, path in source.files:
            yield from read_file(TextFile(name, file_name, path), rule, settings, not_used)


def read_file(
    file: TextFile, rule: SplitRule, settings: TextSettings, not_used: UnusedText
) -> Iterator[Document]:
    """Yield every document of a text file that is not blank, or its pieces.

    The part of a document of a divided source depends on a hash of the seed, the name of the file
    and the number of the document in it, so it is the same on every machine.
    """
    for number, piece in enumerate(read_pieces(file.path, rule.piece_size, settings.fields, not_used)):
        if not piece.text.strip():
            continue
        part = file.source
        if file.is_divided:
            index = piece.document if rule.by_document else number
            part = part_of(f"{settings.seed}:{file.name}:{index}", settings.valid_fraction)
        yield Document(part, piece.text, file.path, piece.line, piece.is_chat)


def part_of(name: str, valid_fraction: float) -> str:
    """Return the part of a document from a hash of its name. It is the same on every machine."""
    share = int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64
    if share < valid_fraction:
        return "calibration"
    return "valid" if share < 2 * valid_fraction else "train"


def next_batch(documents: Iterator[Document], characters: int) -> list[Document]:
    """Return the next documents, with at least so many characters; fewer at the end."""
    batch = []
    length = 0
    for document in documents:
        batch.append(document)
        length += len(document.text)
        if length >= characters:
            break
    return batch


def read_pieces(
    path: Path, piece_size: int, fields: Fields, not_used: UnusedText
) -> Generator[Piece, None, None]:
    """Yield the pieces of a file. Each record of a file of records is a document.

    A .py file that is not UTF-8 is skipped.
    """
    file_format = format_of(path.name) or "text"
    number = -1
    if file_format == "text":
        try:
            yield from _text_pieces(path, piece_size, not_used)
        except NotText:
            if path.suffix != ".py":
                raise
            not_used.add(unused.NOT_UTF8, str(path))
    else:
        for number, (line, record, is_chat) in enumerate(read_records(path, file_format, fields)):
            text = _checked(record, f"{path} line {line}", not_used)
            if len(text) < piece_size or is_chat:
                yield Piece(number, line, text, is_chat)
                continue
            for piece_text in _pieces(text.splitlines(keepends=True), piece_size):
                yield Piece(number, line, piece_text)
        if number < 0:
            not_used.add(unused.EMPTY, str(path))


def _text_pieces(path: Path, piece_size: int, not_used: UnusedText) -> Iterator[Piece]:
    """Yield the pieces of a text file, which is one document."""
    line = 1
    length = 0
    is_blank = True
    with open_text(path) as file:
        # A longer line comes in several parts, so the memory does not depend on the file.
        for text in _pieces(iter(partial(file.readline, LONG_LINE * piece_size + 1), ""), piece_size):
            length += len(text)
            is_blank = is_blank and not text.strip()
            if "\0" in text:
                not_used.add(unused.NUL, f"{path} line {line}")
            yield Piece(0, line, text)
            line += text.count("\n")
    if length == 0:
        not_used.add(unused.EMPTY, str(path))
    elif is_blank:
        not_used.add(unused.BLANK, str(path))


def _checked(text: str, place: str, not_used: UnusedText) -> str:
    """Return the text of a record as valid Unicode, and count blank texts and NUL characters."""
    if not text or text.isspace():
        not_used.add(unused.BLANK, place)
    if "\0" in text:
        not_used.add(unused.NUL, place)
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        not_used.add(unused.SURROGATE, place)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _pieces(lines: Iterable[str], size: int) -> Iterator[str]:
    """Yield pieces of at least `size` characters that end at a blank line.

    After LONG_LINE x `size` characters a piece ends at any line.
    """
    piece: list[str] = []
    length = 0
    for line in _cut_long_lines(lines, size):
        piece.append(line)
        length += len(line)
        if length >= (LONG_LINE * size if line.strip() else size):
            yield "".join(piece)
            piece = []
            length = 0
    yield "".join(piece)


def _cut_long_lines(lines: Iterable[str], size: int) -> Iterator[str]:
    """Yield lines, and lines of more than LONG_LINE x `size` characters in parts of about `size`.

    A line of `lines` that has one character more than this and no line end is continued by the
    next one.
    """
    longest = LONG_LINE * size
    rest = ""
    for line in lines:
        if not rest and len(line) <= longest:
            yield line
            continue
        is_continued = len(line) == longest + 1 and not line.endswith("\n")
        rest += line
        while len(rest) > size:
            end = _end_of_part(rest, size)
            yield rest[:end]
            rest = rest[end:]
        if not is_continued:
            yield rest
            rest = ""
    if rest:
        yield rest


def _end_of_part(line: str, size: int) -> int:
    """Return where to cut a line: before white space near `size`, so that words and tokens stay whole.

    Without white space, a character and the marks on it are not separated.
    """
    for end in range(size, size // 2, -1):
        if line[end].isspace() and not line[end - 1].isspace():
            return end
    for end in range(size, size // 2, -1):
        joined = line[end] in JOINERS or line[end - 1] in JOINERS
        if not joined and not unicodedata.combining(line[end]):
            return end
    return size


def _small_piece_size(source: Source, fields: Fields) -> int:
    """Return a thousandth of the characters of the source, within the limits of a piece."""
    limit = 1000 * MAX_PIECE
    total = 0
    for _, path in source.files:
        total += _num_characters(path, fields, limit - total)
        if total >= limit:
            break
    return min(max(MIN_PIECE, total // 1000), MAX_PIECE)


def _num_characters(path: Path, fields: Fields, limit: int) -> int:
    """Return about the number of characters of a file. Packed files are read up to the limit."""
    if format_of(path.name) == "table":
        sizes = (len(record.text) for record in read_records(path, "table", fields))
        return _sum_to(limit, sizes)
    with reading(path):
        if unpacked_name(path.name) == path.name:
            return path.stat().st_size
        with open_bytes(path) as file:
            return _sum_to(limit, map(len, iter(partial(file.read, CHUNK_BYTES), b"")))


def _sum_to(limit: int, sizes: Iterable[int]) -> int:
    """Return the sum of sizes, without those after it has reached the limit."""
    total = 0
    for size in sizes:
        total += size
        if total >= limit:
            break
    return total


def _has_documents(source: Source, count: int, fields: Fields) -> bool:
    """Return whether the source has at least `count` documents. It reads no more than needed."""
    remaining = count
    for _, path in source.files:
        file_format = format_of(path.name) or "text"
        if file_format == "text":
            remaining -= 1
        else:
            remaining -= sum(1 for _ in islice(read_records(path, file_format, fields), remaining))
        if remaining <= 0:
            return True
    return False
