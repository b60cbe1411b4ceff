"""Text files to indexed datasets, one for each part, in one process.

This file imports neither torch nor Megatron, unless Megatron data is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minitron_mp.data.documents import (
    BATCH_CHARACTERS,
    Document,
    SplitRule,
    TextSettings,
    next_batch,
    part_of,
    read_file,
    split_rule,
)
from minitron_mp.data.indexed_files import MaskedWriter, has_mask, ids_dtype, mask_prefix
from minitron_mp.data.sources import Sources, TextFile
from minitron_mp.data.unused import UnusedText
from minitron_mp.errors import InputError

if TYPE_CHECKING:
    from minitron_mp.data.chat_encoder import ChatEncoder
    from minitron_mp.data.tokenizer import Tokenizer

Progress = Callable[[int], None]
"""Called with the number of documents that were finished since the last call."""


@dataclass(frozen=True)
class TextJob:
    """How files of text become token ids. It can be pickled."""

    tokenizer: Tokenizer
    settings: TextSettings
    rules: dict[str, SplitRule]
    """Source -> how its documents are divided."""
    batch_characters: int = BATCH_CHARACTERS
    """Characters that are tokenized together. The result does not depend on it."""
    chats: ChatEncoder | None = None
    """Encoder of the chats. None: no field of records has chats."""


@dataclass
class WrittenText:
    """What was written from some files."""

    parts: list[str] = field(default_factory=list)
    """Parts that have documents."""
    masks: list[str] = field(default_factory=list)
    """Parts that have a loss mask."""
    num_documents: int = 0
    not_used: UnusedText = field(default_factory=UnusedText)


def text_job(
    sources: Sources, tokenizer: Tokenizer, settings: TextSettings, chat_template: str | None = None
) -> TextJob:
    """Return how the text of a recipe becomes token ids. chat_template: data.chat_template."""
    rules = {name: split_rule(name, source, settings) for name, source in sources.items()}
    if settings.fields.chat is None:
        return TextJob(tokenizer, settings, rules)
    from minitron_mp.data.chat_encoder import load_chat_encoder

    return TextJob(tokenizer, settings, rules, chats=load_chat_encoder(tokenizer, chat_template))


def files_to_tokenize(sources: Sources) -> list[TextFile]:
    """Return all files in the order of their documents: text, then Megatron data that is divided."""
    files = [TextFile(name, *file) for name, source in sources.items() for file in source.files]
    prefixes = sources["source"].prefixes if "source" in sources else []
    return files + [
        TextFile("source", Path(prefix).name, Path(prefix), is_tokenized=True) for prefix in prefixes
    ]


def write_parts(
    files: Iterable[TextFile], job: TextJob, folder: Path, progress: Progress | None = None
) -> WrittenText:
    """Write the documents of files, one dataset for each part, and return what was written.

    A text begins with bos if the tokenizer adds bos, and ends with eod. Token ids and loss masks of
    Megatron data are not changed. InputError for an invalid file, or for an id without embedding.
    """
    written = WrittenText()
    writer = _PartWriter(folder, job.tokenizer.vocab_size)
    texts = [file for file in files if not file.is_tokenized]
    documents = _documents(texts, job, written.not_used)
    batch = next_batch(documents, job.batch_characters)
    while batch:
        for document, (ids, mask) in zip(batch, _encode(job, batch)):
            writer.add(document.part, ids, mask)
        written.num_documents += len(batch)
        if progress:
            progress(len(batch))
        batch = next_batch(documents, job.batch_characters)
    for file in files:
        if file.is_tokenized:
            written.num_documents += _divide_tokenized(file, job.settings, writer)
    writer.finish()
    written.parts = list(writer.datasets)
    written.masks = [part for part, dataset in writer.datasets.items() if dataset.mask is not None]
    return written


def _documents(files: Iterable[TextFile], job: TextJob, not_used: UnusedText) -> Iterator[Document]:
    for file in files:
        yield from read_file(file, job.rules[file.source], job.settings, not_used)


def _encode(job: TextJob, batch: list[Document]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield token ids and loss mask of each document. The mask is None if all tokens count.

    InputError for an id without embedding.
    """
    tokenizer = job.tokenizer
    beginning = [] if tokenizer.bos is None else [tokenizer.bos]
    dtype = ids_dtype(tokenizer.vocab_size)
    texts = iter(tokenizer.encode([document.text for document in batch if not document.is_chat]))
    chats = iter(job.chats([document for document in batch if document.is_chat]) if job.chats else ())
    for document in batch:
        mask = None
        if document.is_chat:
            chat = next(chats)
            ids, mask = chat.ids, chat.mask
        else:
            ids = [*beginning, *next(texts), tokenizer.eod]
        unknown = tokenizer.id_without_embedding(ids)
        if unknown is not None:
            place = document.place_of(tokenizer.token_of(unknown))
            raise InputError(f"{place} {tokenizer.no_embedding(unknown)}")
        yield np.array(ids, dtype), mask


def _divide_tokenized(file: TextFile, settings: TextSettings, writer: _PartWriter) -> int:
    """Write the documents of Megatron data into the parts, and return their number."""
    count = 0
    for number, (ids, mask) in enumerate(_tokenized_documents(str(file.path))):
        writer.add(part_of(f"{settings.seed}:{file.name}:{number}", settings.valid_fraction), ids, mask)
        count += 1
    return count


def _tokenized_documents(prefix: str) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield token ids and loss mask of each document of Megatron data."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    masks = IndexedDataset(str(mask_prefix(prefix))) if has_mask(prefix) else None
    for first, last in pairwise(dataset.document_indices):
        ids = np.concatenate([dataset[i] for i in range(first, last)])
        yield ids, None if masks is None else np.concatenate([masks[i] for i in range(first, last)])


class _PartWriter:
    """Writes documents of several parts, each as an indexed dataset."""

    def __init__(self, output: Path, vocab_size: int):
        self.output = output
        self.dtype = ids_dtype(vocab_size)
        self.datasets: dict[str, MaskedWriter] = {}

    def add(self, part: str, ids: np.ndarray, mask: np.ndarray | None) -> None:
        """Append a document. mask: None if all tokens count."""
        if part not in self.datasets:
            self.datasets[part] = MaskedWriter(self.output / part, self.dtype)
        self.datasets[part].add(ids, mask)

    def finish(self) -> None:
        """Write the indices."""
        for dataset in self.datasets.values():
            dataset.close()
