"""Writing of Megatron's indexed datasets: <prefix>.bin and <prefix>.idx, one sequence per document.

The files are bitwise those of Megatron's IndexedDatasetBuilder. It is not used, because it imports
torch, which a process that tokenizes does not need, and keeps several Python objects per document.

A dataset with chats has a second one beside it, <prefix>.loss_mask, with the same lengths: uint8, 1
for tokens that count in the loss. Without it all tokens count.

.bin: the token ids of all documents. .idx: header, number of documents D, number of boundaries D + 1,
int32 [D] tokens of each document, int64 [D] byte offset of each document, int64 [D + 1] boundaries.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

HEADER = struct.Struct("<9sQBQQ")
"""Magic bytes, version, code of the dtype, number of sequences, number of document boundaries."""

MAGIC = b"MMIDIDX\x00\x00"

DTYPE_CODES: dict[np.dtype, int] = {np.dtype(np.uint8): 1, np.dtype(np.uint16): 8, np.dtype(np.int32): 4}

LOSS_MASK = ".loss_mask"
"""End of the prefix of a loss mask."""

MASK_DTYPE = np.dtype(np.uint8)

MAX_UINT16_VOCABULARY = 65500
"""Vocabularies below this size are stored as uint16, as Megatron does."""

SUFFIXES = (".bin", ".idx", f"{LOSS_MASK}.bin", f"{LOSS_MASK}.idx")
"""Files of a dataset and of its loss mask."""

COPY_BYTES = 1 << 24
ONES = bytes([1]) * COPY_BYTES
COPY_THREADS = 8


def ids_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of token ids on disk."""
    return np.dtype(np.uint16 if vocab_size < MAX_UINT16_VOCABULARY else np.int32)


def mask_prefix(prefix: Path | str) -> Path:
    """Return the prefix of the loss mask of a dataset."""
    return Path(f"{prefix}{LOSS_MASK}")


def has_mask(prefix: Path | str) -> bool:
    """Return whether a dataset has a loss mask."""
    return Path(f"{prefix}{LOSS_MASK}.idx").is_file()


class DatasetWriter:
    """Writes documents as one indexed dataset. The index is written by close()."""

    def __init__(self, prefix: Path, dtype: np.dtype):
        self.prefix = prefix
        self.dtype = dtype
        self.lengths = array("i")
        self.file = prefix.with_name(f"{prefix.name}.bin").open("wb")

    def add(self, ids: np.ndarray) -> None:
        """Append a document."""
        self.file.write(ids.astype(self.dtype, copy=False).tobytes())
        self.lengths.append(len(ids))

    def close(self) -> None:
        """Write the index. After that the files survive a crash of the machine."""
        _sync_and_close(self.file)
        _write_index(self.prefix, self.dtype, np.frombuffer(self.lengths, np.int32))


class MaskedWriter:
    """Writes documents as one indexed dataset, and their loss mask from the first document that has one."""

    def __init__(self, prefix: Path, dtype: np.dtype):
        self.prefix = prefix
        self.tokens = DatasetWriter(prefix, dtype)
        self.mask: DatasetWriter | None = None

    def add(self, ids: np.ndarray, mask: np.ndarray | None) -> None:
        """Append a document. mask: uint8; None if all tokens count."""
        if mask is not None and self.mask is None:
            self.mask = DatasetWriter(mask_prefix(self.prefix), MASK_DTYPE)
            for length in self.tokens.lengths:
                self.mask.add(np.ones(length, MASK_DTYPE))
        self.tokens.add(ids)
        if self.mask is not None:
            self.mask.add(np.ones(len(ids), MASK_DTYPE) if mask is None else mask)

    def close(self) -> None:
        """Write the indices."""
        self.tokens.close()
        if self.mask is not None:
            self.mask.close()


def lengths_of(prefix: Path) -> np.ndarray:
    """Return the tokens of each document of a dataset that DatasetWriter wrote, int32 [D].

    ValueError for damaged files.
    """
    with prefix.with_name(f"{prefix.name}.idx").open("rb") as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise ValueError(f"{prefix}.idx is no index")
        _, _, code, count, _ = HEADER.unpack(header)
        lengths = np.fromfile(file, np.int32, count)
    itemsize = next((dtype.itemsize for dtype, known in DTYPE_CODES.items() if known == code), 0)
    num_bytes = int(lengths.sum(dtype=np.int64)) * itemsize
    if len(lengths) < count or num_bytes != prefix.with_name(f"{prefix.name}.bin").stat().st_size:
        raise ValueError(f"{prefix}.bin does not have the {num_bytes} bytes of its index")
    return lengths


def concatenate(prefixes: list[Path], target: Path, dtype: np.dtype) -> None:
    """Write one dataset with the documents of several datasets, in order, and their loss masks."""
    lengths = [lengths_of(prefix) for prefix in prefixes]
    _concatenate(prefixes, lengths, target, dtype)
    if any(map(has_mask, prefixes)):
        masks = [mask_prefix(prefix) if has_mask(prefix) else None for prefix in prefixes]
        _concatenate(masks, lengths, mask_prefix(target), MASK_DTYPE)


def _concatenate(
    prefixes: Sequence[Path | None], lengths: list[np.ndarray], target: Path, dtype: np.dtype
) -> None:
    """Write one dataset. None stands for a loss mask in which all tokens count.

    Threads copy the files, each to its place, because one thread does not use a parallel file system.
    """
    sizes = [int(each.sum(dtype=np.int64)) * dtype.itemsize for each in lengths]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    with target.with_name(f"{target.name}.bin").open("wb") as file:
        file.truncate(sum(sizes))

        def copy(prefix: Path | None, start: int, size: int) -> None:
            if prefix is None:
                for position in range(start, start + size, COPY_BYTES):
                    _write_at(file.fileno(), ONES[: start + size - position], position)
            else:
                _copy_to(prefix.with_name(f"{prefix.name}.bin"), file.fileno(), start)

        with ThreadPoolExecutor(COPY_THREADS) as pool:
            list(pool.map(copy, prefixes, starts, sizes))
        _sync_and_close(file)
    _write_index(target, dtype, np.concatenate(lengths))


def append(prefix: Path, other: Path, dtype: np.dtype) -> None:
    """Append the documents of another dataset to a dataset, with their loss masks, and delete the other."""
    lengths = [lengths_of(prefix), lengths_of(other)]
    if has_mask(prefix) or has_mask(other):
        masks = [mask_prefix(each) if has_mask(each) else None for each in (prefix, other)]
        joined = prefix.with_name(f"{prefix.name}.joined")
        _concatenate(masks, lengths, joined, MASK_DTYPE)
        move(joined, mask_prefix(prefix))
    with prefix.with_name(f"{prefix.name}.bin").open("r+b") as file:
        _copy_to(other.with_name(f"{other.name}.bin"), file.fileno(), file.seek(0, os.SEEK_END))
        _sync_and_close(file)
    _write_index(prefix, dtype, np.concatenate(lengths))
    for suffix in SUFFIXES:
        Path(f"{other}{suffix}").unlink(missing_ok=True)


def move(prefix: Path, target: Path) -> None:
    """Rename a dataset and its loss mask. An existing target is replaced."""
    for suffix in SUFFIXES:
        source = Path(f"{prefix}{suffix}")
        if source.exists():
            source.replace(f"{target}{suffix}")


def _copy_to(source: Path, target: int, position: int) -> None:
    """Copy a file to a position of an open file. target: file descriptor."""
    with source.open("rb", buffering=0) as file:
        while part := file.read(COPY_BYTES):
            _write_at(target, part, position)
            position += len(part)


def _write_at(target: int, content: bytes, position: int) -> None:
    """Write bytes at a position of an open file. target: file descriptor."""
    view = memoryview(content)
    while view:
        written = os.pwrite(target, view, position)
        position += written
        view = view[written:]


def _write_index(prefix: Path, dtype: np.dtype, lengths: np.ndarray) -> None:
    with prefix.with_name(f"{prefix.name}.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype], len(lengths), len(lengths) + 1))
        file.write(lengths.tobytes())
        ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
        file.write(np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]]).tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
        _sync_and_close(file)


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
