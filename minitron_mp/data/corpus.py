"""Text as Megatron indexed datasets: one or more datasets for each part.

tokenize_corpus() writes <part>.bin, <part>.idx, the loss masks of chats (indexed_files.py), text.json
(unused.py), and parts.json, which lists the prefixes of each part, and of each text of a blend.
Megatron data that the recipe lists for a part is not copied: parts.json lists its prefix. Megatron
data in data.source is divided by document, like text. Importing this module imports neither torch nor
Megatron.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minitron_mp.artifacts.files import read_json, write_text
from minitron_mp.config.data import DataConfig
from minitron_mp.data.documents import TextSettings
from minitron_mp.data.held_out import limit_held_out
from minitron_mp.data.indexed_files import MASK_DTYPE, has_mask, lengths_of, mask_prefix
from minitron_mp.data.sources import (
    PARTS,
    Sources,
    TextFile,
    fields_of,
    find_sources,
    set_names,
    unused_text,
)
from minitron_mp.data.tokenize import (
    Progress,
    TextJob,
    WrittenText,
    files_to_tokenize,
    text_job,
    write_parts,
)
from minitron_mp.errors import InputError

if TYPE_CHECKING:
    from minitron_mp.data.tokenizer import Tokenizer

PARTS_FILE = "parts.json"

MASKS = "loss masks"
"""Key in PARTS_FILE for the prefixes that have a loss mask. No text has a name with a space."""

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
    progress: Progress | None = None,
) -> dict[str, int]:
    """Write the three parts into a folder, and return the number of tokens of each part.

    One process calls it. held_out: write the texts of data.held_out instead. output: output folder
    of the run, which is not read if a folder of text contains it. progress: called with the number
    of documents of each batch. Megatron data of a part is not copied. InputError for a missing
    path, an invalid line, a part without documents, or an id without embedding.
    """
    text = open_text_of(data, tokenizer, seed, held_out=held_out, output=output)
    folder.mkdir(parents=True, exist_ok=True)
    return finish_corpus(text, write_parts(text.files, text.job, folder, progress), folder)


@dataclass(frozen=True)
class CorpusText:
    """The text of a recipe before it is tokenized."""

    data: DataConfig
    held_out: bool
    sources: Sources
    job: TextJob

    @property
    def files(self) -> list[TextFile]:
        """All files that are tokenized or divided, in order."""
        return files_to_tokenize(self.sources)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts, or the names in data.held_out."""
        return tuple(self.data.held_out) if self.held_out else PARTS


def open_text_of(
    data: DataConfig, tokenizer: Tokenizer, seed: int, *, held_out: bool = False, output: Path | None = None
) -> CorpusText:
    """Return the text of a recipe, as for tokenize_corpus(). InputError for text that cannot be used."""
    sources = find_sources(data, held_out, output)
    for source in sources.values():
        for prefix in source.prefixes:
            check_ids(prefix, tokenizer)
            check_mask(prefix)
    settings = TextSettings(data.valid_fraction, seed, fields_of(data))
    job = text_job(sources, tokenizer, settings, data.chat_template)
    return CorpusText(data, held_out, sources, job)


def finish_corpus(text: CorpusText, written: WrittenText, folder: Path) -> dict[str, int]:
    """Write parts.json and text.json beside the datasets, and return the tokens of each part.

    written: what write_parts() wrote into the folder.
    """
    data = text.data
    parts: dict[str, list[list[str]]] = {}
    for part in text.parts:
        parts[part] = []
        for name in [part] if text.held_out else set_names(data, part):
            datasets = [name] if name in written.parts else []
            parts[part].append(datasets + (text.sources[name].prefixes if name in text.sources else []))
    check_not_empty(parts, data, text.sources, written.num_documents)
    if data.valid_tokens is not None and not text.held_out:
        seed = text.job.settings.seed
        limit_held_out(folder, {part: texts[0] for part, texts in parts.items()}, data.valid_tokens, seed)
    content: dict[str, object] = {
        part: texts[0] if data.shares(part) is None else texts for part, texts in parts.items()
    }
    prefixes = [prefix for texts in parts.values() for text_prefixes in texts for prefix in text_prefixes]
    masks = [prefix for prefix in prefixes if has_mask(folder / prefix)]
    if masks:
        content[MASKS] = masks
    elif data.chat_field is not None and not text.held_out:
        raise InputError(no_chats(data))
    write_text(folder / PARTS_FILE, json.dumps(content, indent=1))
    not_used = unused_text(text.sources)
    not_used.update(written.not_used)
    not_used.save(folder)
    return {
        part: sum(_num_tokens(folder, prefix) for texts_of_part in texts for prefix in texts_of_part)
        for part, texts in parts.items()
    }


def no_chats(data: DataConfig) -> str:
    """Return a sentence about a text without chats."""
    return f'data.chat_field: no record of the text has the field "{data.chat_field}"; correct or drop it'


def _num_tokens(folder: Path, prefix: str) -> int:
    """Return the tokens of a dataset. prefix: in parts.json."""
    if Path(prefix).is_absolute():
        return tokens_of(prefix)[0]
    # Written datasets are not opened by Megatron, whose import takes longer than a small text.
    return int(lengths_of(folder / prefix).sum(dtype=np.int64))


def check_not_empty(
    parts: dict[str, list[list[str]]], data: DataConfig, sources: Sources, num_documents: int
) -> None:
    """Raise InputError if a text has no prefix.

    parts: part -> the prefixes of each of its texts. num_documents: number of documents of all
    sources.
    """
    empty = [part for part, texts in parts.items() if not all(texts)]
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
    """Return the absolute prefixes of a part."""
    return [prefix for text in texts_of(folder, part) for prefix in text]


def texts_of(folder: Path, part: str) -> list[list[str]]:
    """Return the absolute prefixes of each text of a blend; of one text if the part is no blend.

    Relative prefixes in parts.json are inside `folder`.
    """
    content = read_json(folder / PARTS_FILE, "data --force")[part]
    texts = [content] if isinstance(content[0], str) else content
    return [[str(folder.resolve() / prefix) for prefix in prefixes] for prefixes in texts]


def check_masks(folder: Path, part: str) -> None:
    """Raise InputError if a loss mask of a part is missing. Without it all tokens would count."""
    masks = read_json(folder / PARTS_FILE, "data --force").get(MASKS, [])
    known = {str(folder.resolve() / prefix) for prefix in masks}
    for prefix in prefixes_of(folder, part):
        if prefix in known and not has_mask(prefix):
            raise InputError(
                f"{mask_prefix(prefix)}.idx, the loss mask of chats, is missing; restore it, or run "
                "`minitron-mp data --force`"
            )


def counted_tokens(folder: Path, parts: Iterable[str]) -> dict[str, int]:
    """Return the tokens of each part that count in the loss; {} if no text has a loss mask."""
    if MASKS not in read_json(folder / PARTS_FILE, "data --force"):
        return {}
    return {part: sum(_num_counted(prefix) for prefix in prefixes_of(folder, part)) for part in parts}


def _num_counted(prefix: str) -> int:
    if not has_mask(prefix):
        return tokens_of(prefix)[0]
    return int(np.count_nonzero(np.memmap(f"{mask_prefix(prefix)}.bin", MASK_DTYPE, mode="r")))


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


def check_mask(prefix: str) -> None:
    """Raise InputError if Megatron data has a loss mask that does not fit its tokens."""
    if not has_mask(prefix):
        return
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    mask = str(mask_prefix(prefix))
    _, dtype = tokens_of(mask)
    # Keep references to the datasets, as in tokens_of().
    tokens, counted = IndexedDataset(prefix), IndexedDataset(mask)
    if dtype != MASK_DTYPE or not np.array_equal(tokens.sequence_lengths, counted.sequence_lengths):
        raise InputError(
            f"{mask}.bin and .idx, the loss mask of {prefix}, must have one byte for each of its tokens, and "
            "the same documents; create or copy it again, or delete it"
        )


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
