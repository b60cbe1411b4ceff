"""Checks of the text before a run: its paths, and the beginning of its files."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_mp.config.data import DataConfig
from minitron_mp.data.corpus import check_ids, check_mask, check_not_empty, no_chats
from minitron_mp.data.documents import (
    MAX_PIECE,
    MIN_PIECE,
    Document,
    Piece,
    TextSettings,
    read_documents,
    read_pieces,
)
from minitron_mp.data.folders import SHOWN_PROBLEMS
from minitron_mp.data.record_fields import Fields
from minitron_mp.data.sources import PARTS, STDLIB, Sources, fields_of, find_sources
from minitron_mp.data.tokenizer import Tokenizer
from minitron_mp.data.unused import UnusedText
from minitron_mp.errors import InputError

if TYPE_CHECKING:
    from minitron_mp.data.chat_encoder import ChatEncoder

CHECKED_FILES = 500
"""Number of files whose beginning is read. They are spread evenly over the text."""

CHECKED_STDLIB_FILES = 10
"""Number of files of the standard library whose beginning is read."""

MAX_BLANK_PIECES = 5_000
"""Number of blank pieces at the beginning of a file that are read to find its first text."""

MAX_SMALL_TEXT = 1 << 22
"""Bytes of the files of a text up to which all of its documents are read."""

CHECKED_CHARACTERS = 20_000
"""Characters of a file that are tokenized if the model has no embedding for some ids."""


def corpus_problems(
    data: DataConfig,
    output: Path,
    tokenizer: Tokenizer | None,
    *,
    parts: bool = True,
    held_out: bool = True,
    seed: int | None = None,
) -> list[str]:
    """Return a sentence for each path or file of the recipe's text that cannot be used.

    output: as in find_sources(). tokenizer: None if it cannot be loaded. parts, held_out: as in
    find_all_sources(). seed: None leaves out whether a small source has documents for each part.
    """
    problems: list[str] = []
    chats = _chat_encoder(data, tokenizer, problems)
    for is_held_out, is_wanted in ((False, parts), (True, held_out)):
        if not is_wanted:
            continue
        try:
            sources = find_sources(data, is_held_out, output)
        except InputError as error:
            problems += [row.removeprefix("  - ") for row in str(error).splitlines()[1:]]
        else:
            problems += _file_problems(sources, fields_of(data), tokenizer, chats)
            if not is_held_out and not problems:
                problems += _missing_chats(data, sources)
            if seed is not None and "source" in sources and not problems:
                problems += _part_problems(data, sources, seed)
    return problems


def _chat_encoder(data: DataConfig, tokenizer: Tokenizer | None, problems: list[str]) -> ChatEncoder | None:
    """Return the encoder of chats, or None without chats. Add a sentence if the template is unusable."""
    if data.chat_field is None or tokenizer is None:
        return None
    from minitron_mp.data.chat_encoder import load_chat_encoder

    try:
        return load_chat_encoder(tokenizer, data.chat_template)
    except InputError as error:
        problems.append(str(error))
        return None


def _file_problems(
    sources: Sources, fields: Fields, tokenizer: Tokenizer | None, chats: ChatEncoder | None
) -> list[str]:
    """Return a sentence for each file whose beginning cannot be used, SHOWN_PROBLEMS at most."""
    problems = []
    for name, source in sources.items():
        paths = [path for _, path in source.files]
        step = 1 + len(paths) // (CHECKED_STDLIB_FILES if name == STDLIB else CHECKED_FILES)
        pieces = []
        for path in paths[::step]:
            try:
                piece = _first_piece(path, fields)
            except InputError as error:
                problems.append(str(error))
            else:
                pieces += [(path, piece)] if piece else []
        if step == 1 and not pieces and not source.prefixes and not problems:
            problems.append(f"all files of {name} are empty ({paths[0]}); give files with text")
        if tokenizer is not None:
            problems += _token_problems(pieces, source.prefixes, tokenizer)
        if chats is not None:
            problems += _chat_problems(pieces, chats)
    if len(problems) > SHOWN_PROBLEMS:
        more = len(problems) - SHOWN_PROBLEMS
        problems = [*problems[:SHOWN_PROBLEMS], f"{more:,} more files have such problems"]
    return problems


def _part_problems(data: DataConfig, sources: Sources, seed: int) -> list[str]:
    """Return a sentence if a small source has no document for one of the parts."""
    source = sources["source"]
    if source.prefixes or sum(path.stat().st_size for _, path in source.files) > MAX_SMALL_TEXT:
        return []
    found: set[str] = set()
    num_documents = 0
    settings = TextSettings(data.valid_fraction, seed, fields_of(data))
    documents = read_documents(sources, settings, UnusedText())
    try:
        for document in documents:
            num_documents += 1
            found.add(document.part)
            if len(found) == len(PARTS):
                return []
        parts = {part: [[part] if part in found else []] for part in PARTS}
        check_not_empty(parts, data, sources, num_documents)
    except InputError as error:
        return [str(error)]
    return []


def _first_piece(path: Path, fields: Fields) -> Piece | None:
    """Return the first piece that is not blank, or a blank one after MAX_BLANK_PIECES of them.

    None if the whole file is blank.
    """
    with closing(read_pieces(path, MIN_PIECE, fields, UnusedText())) as pieces:
        for number, piece in enumerate(pieces):
            if piece.text.strip() or number == MAX_BLANK_PIECES:
                return piece
    return None


def _token_problems(pieces: list[tuple[Path, Piece]], prefixes: list[str], tokenizer: Tokenizer) -> list[str]:
    """Return sentences about Megatron data with unknown ids, and the first text with such an id."""
    problems = []
    for prefix in prefixes:
        try:
            check_ids(prefix, tokenizer)
            check_mask(prefix)
        except InputError as error:
            problems.append(str(error))
    if tokenizer.num_embeddings is None:
        return problems
    for path, piece in pieces:
        if piece.is_chat:
            continue
        (ids,) = tokenizer.encode([piece.text[:CHECKED_CHARACTERS]])
        unknown = tokenizer.id_without_embedding(ids)
        if unknown is not None:
            place = Document("", piece.text, path, piece.line).place_of(tokenizer.token_of(unknown))
            return [*problems, f"{place} {tokenizer.no_embedding(unknown)}"]
    return problems


def _missing_chats(data: DataConfig, sources: Sources) -> list[str]:
    """Return a sentence if no record of a small text has the field of chats."""
    paths = [path for source in sources.values() for _, path in source.files]
    is_tokenized = any(source.prefixes for source in sources.values())
    if data.chat_field is None or is_tokenized or sum(path.stat().st_size for path in paths) > MAX_SMALL_TEXT:
        return []
    try:
        for path in paths:
            if any(piece.is_chat for piece in read_pieces(path, MAX_PIECE, fields_of(data), UnusedText())):
                return []
    except InputError as error:
        return [str(error)]
    return [no_chats(data)]


def _chat_problems(pieces: list[tuple[Path, Piece]], chats: ChatEncoder) -> list[str]:
    """Return a sentence for each file whose first chat cannot be encoded."""
    problems = []
    for path, piece in pieces:
        try:
            chats([Document("", piece.text, path, piece.line)] if piece.is_chat else [])
        except InputError as error:
            problems.append(str(error))
    return problems
