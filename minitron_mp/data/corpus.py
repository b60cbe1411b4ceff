"""Text as Megatron indexed datasets: one or more datasets for each part.

tokenize_corpus() writes <part>.bin, <part>.idx, text.json (unused.py), and parts.json, which lists
the prefixes of each part. Megatron data that the recipe lists for a part is not copied: parts.json
lists its prefix. Megatron data in data.source is divided by document, like text. Importing this
module imports neither torch nor Megatron.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minitron_mp.artifacts.files import read_json, write_text
from minitron_mp.config.data import DataConfig
from minitron_mp.data.documents import Document, next_batch, part_of, read_documents
from minitron_mp.data.sources import PARTS, Sources, find_sources, unused_text
from minitron_mp.errors import InputError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from minitron_mp.data.tokenizer import Tokenizer

PARTS_FILE = "parts.json"

CHECKED_IDS = 1 << 22
"""Number of token ids at the start and end of Megatron data that must be in the vocabulary."""


def tokenize_corpus(
    data: DataConfig,
    tokenizer: Tokenizer,
    folder: Path,
    seed: int,
    *,
    held_out: bool = False,
    output: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Write the three parts into a folder, and return the number of tokens of each part.

    One process calls it. held_out: write the texts of data.held_out instead. output: output folder
    of the run, which is not read if a folder of text contains it. progress: called with the number
    of finished documents. The part of a document of data.source depends on a hash of seed and its
    name, which is the same on every machine. A text begins with bos if the tokenizer adds bos, and
    ends with eod. Megatron data is not changed. InputError for a missing path, an invalid line, a
    part without documents, or an id without embedding.
    """
    sources = find_sources(data, held_out, output)
    not_used = unused_text(sources)
    for source in sources.values():
        for prefix in source.prefixes:
            check_ids(prefix, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    writer = _PartWriter(folder, tokenizer.vocab_size)
    documents = read_documents(sources, data.valid_fraction, seed, field=data.text_field, not_used=not_used)
    num_documents = 0
    batch = next_batch(documents)
    while batch:
        for document, ids in zip(batch, _encode(tokenizer, batch)):
            writer.add(document.part, ids)
        num_documents += len(batch)
        if progress:
            progress(num_documents)
        batch = next_batch(documents)
    for prefix in sources["source"].prefixes if "source" in sources else []:
        for number, ids in enumerate(_tokenized_documents(prefix)):
            part = part_of(f"{seed}:{Path(prefix).name}:{number}", data.valid_fraction)
            writer.add(part, ids)
            num_documents += 1
    writer.finish()

    parts = {}
    for part in data.held_out if held_out else PARTS:
        written = [part] if part in writer.builders else []
        parts[part] = written + (sources[part].prefixes if part in sources else [])
    check_not_empty(parts, data, sources, num_documents)
    write_text(folder / PARTS_FILE, json.dumps(parts, indent=1))
    not_used.save(folder)
    return {part: sum(tokens_of(prefix)[0] for prefix in prefixes_of(folder, part)) for part in parts}


def _encode(tokenizer: Tokenizer, batch: list[Document]) -> Iterator[np.ndarray]:
    """Yield the token ids of each document, with bos and eod. InputError for an id without embedding."""
    beginning = [] if tokenizer.bos is None else [tokenizer.bos]
    for document, ids in zip(batch, tokenizer.encode([document.text for document in batch])):
        unknown = tokenizer.id_without_embedding(ids)
        if unknown is not None:
            place = document.place_of(tokenizer.token_of(unknown))
            raise InputError(f"{place} {tokenizer.no_embedding(unknown)}")
        yield np.array([*beginning, *ids, tokenizer.eod])


class _PartWriter:
    """Writes documents of several parts, each as an indexed dataset."""

    def __init__(self, output: Path, vocab_size: int):
        self.output = output
        self.vocab_size = vocab_size
        self.builders: dict[str, IndexedDatasetBuilder] = {}

    def add(self, part: str, ids: np.ndarray) -> None:
        """Append a document."""
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        if part not in self.builders:
            self.builders[part] = IndexedDatasetBuilder(
                str(self.output / f"{part}.bin"), dtype=DType.optimal_dtype(self.vocab_size)
            )
        self.builders[part].add_document(ids, [len(ids)])

    def finish(self) -> None:
        """Write the indices."""
        for part, builder in self.builders.items():
            builder.finalize(str(self.output / f"{part}.idx"))


def check_not_empty(
    parts: dict[str, list[str]], data: DataConfig, sources: Sources, num_documents: int
) -> None:
    """Raise InputError if a part has no prefix. num_documents: number of documents of all sources."""
    empty = [part for part, prefixes in parts.items() if not prefixes]
    if not empty:
        return
    if data.train:
        reason = "its documents are blank; give text in these parts"
    else:
        reason = (
            f"{', '.join(sources)} has {num_documents} documents that are not blank; give more text, "
            f"raise data.valid_fraction ({data.valid_fraction}), or list data.calibration, data.train "
            "and data.valid"
        )
    raise InputError(f"no text for {', '.join(empty)}: {reason}")


def prefixes_of(folder: Path, part: str) -> list[str]:
    """Return the absolute prefixes of a part. Relative ones in parts.json are inside `folder`."""
    prefixes = read_json(folder / PARTS_FILE, "data --force")[part]
    return [str(folder.resolve() / prefix) for prefix in prefixes]


def tokens_of(prefix: str) -> tuple[int, np.dtype]:
    """Return the number of tokens and their dtype. InputError for damaged or missing files."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        size = Path(prefix + ".bin").stat().st_size
        # Keep a reference to the dataset: its arrays point into a memory map that it owns.
        dataset = IndexedDataset(prefix)
        num_tokens = int(dataset.sequence_lengths.sum())
        dtype = np.dtype(dataset.index.dtype)
    except (AssertionError, ValueError, OSError, struct.error) as error:
        raise InputError(
            f"{prefix}.bin and .idx are not a Megatron indexed dataset ({error}); create or copy them again"
        ) from error
    if not 0 < num_tokens * dtype.itemsize <= size:
        raise InputError(
            f"{prefix}.bin has {size} bytes, but its index lists {num_tokens} tokens of {dtype.itemsize} "
            "bytes; create or copy it again"
        )
    return num_tokens, dtype


def _tokenized_documents(prefix: str) -> Iterator[np.ndarray]:
    """Yield the token ids of each document of Megatron data."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    for first, last in pairwise(dataset.document_indices):
        yield np.concatenate([dataset[i] for i in range(first, last)])


def check_ids(prefix: str, tokenizer: Tokenizer) -> None:
    """Raise InputError if the first or last CHECKED_IDS token ids are outside the vocabulary."""
    _, dtype = tokens_of(prefix)
    ids = np.memmap(prefix + ".bin", dtype, mode="r")
    largest = int(max(ids[:CHECKED_IDS].max(), ids[-CHECKED_IDS:].max()))
    if largest >= tokenizer.vocab_size:
        raise InputError(
            f"{prefix} has token id {largest}, but the tokenizer has ids up to {tokenizer.vocab_size - 1}; "
            "tokenize the text again, or set data.tokenizer"
        )
    if tokenizer.id_without_embedding([largest]) is not None:
        raise InputError(f"{prefix} {tokenizer.no_embedding(largest)}")
