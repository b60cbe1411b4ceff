"""Checks of the text before a run: its paths, and the beginning of its files."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from minitron_mp.config.data import DataConfig
from minitron_mp.data.corpus import check_ids
from minitron_mp.data.documents import MIN_PIECE, Document, read_pieces
from minitron_mp.data.sources import STDLIB, Sources, find_sources
from minitron_mp.data.tokenizer import Tokenizer
from minitron_mp.data.unused import UnusedText
from minitron_mp.errors import InputError

CHECKED_FILES = 500
"""Number of files whose beginning is read. They are spread evenly over the text."""

CHECKED_STDLIB_FILES = 10
"""Number of files of the standard library whose beginning is read."""

SHOWN_PROBLEMS = 5
"""Number of problems that are shown of one text."""


def corpus_problems(data: DataConfig, output: Path, tokenizer: Tokenizer | None) -> list[str]:
    """Return a sentence for each path or file of the recipe's text that cannot be used.

    output: as in find_sources(). tokenizer: None if it cannot be loaded.
    """
    problems = []
    for held_out in (False, True):
        try:
            sources = find_sources(data, held_out, output)
        except InputError as error:
            problems += [row.removeprefix("  - ") for row in str(error).splitlines()[1:]]
        else:
            problems += _file_problems(sources, data.text_field, tokenizer)
    return problems


def _file_problems(sources: Sources, field: str, tokenizer: Tokenizer | None) -> list[str]:
    """Return a sentence for each file whose beginning cannot be used, SHOWN_PROBLEMS at most."""
    problems = []
    for name, source in sources.items():
        paths = [path for _, path in source.files]
        step = 1 + len(paths) // (CHECKED_STDLIB_FILES if name == STDLIB else CHECKED_FILES)
        found = [_problem(path, field, tokenizer) for path in paths[::step]]
        if tokenizer is not None:
            found += [_prefix_problem(prefix, tokenizer) for prefix in source.prefixes]
        problems += [problem for problem in found if problem]
    if len(problems) > SHOWN_PROBLEMS:
        more = len(problems) - SHOWN_PROBLEMS
        problems = [*problems[:SHOWN_PROBLEMS], f"{more:,} more files have such problems"]
    return problems


def _prefix_problem(prefix: str, tokenizer: Tokenizer) -> str | None:
    try:
        check_ids(prefix, tokenizer)
    except InputError as error:
        return str(error)
    return None


def _problem(path: Path, field: str, tokenizer: Tokenizer | None) -> str | None:
    try:
        with closing(read_pieces(path, MIN_PIECE, field, UnusedText())) as pieces:
            piece = next(pieces, None)
    except InputError as error:
        return str(error)
    if piece is None or tokenizer is None or tokenizer.num_embeddings is None:
        return None
    (ids,) = tokenizer.encode([piece.text])
    unknown = tokenizer.id_without_embedding(ids)
    if unknown is None:
        return None
    document = Document("", piece.text, path, piece.line)
    return f"{document.place_of(tokenizer.token_of(unknown))} {tokenizer.no_embedding(unknown)}"
