"""Megatron's dataset of samples over files that are mapped into memory without open descriptors, with
the loss masks of chats.

Megatron-Core opens up to six descriptors per prefix, because np.memmap keeps one for each map.
Hundreds of prefixes would exceed the usual limit of 1024.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType

from minitron_mp.data.indexed_files import has_mask, mask_prefix

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

MAP_FAILED = ctypes.c_void_p(-1).value


def map_file(path: str | Path) -> np.ndarray:
    """Return the bytes of a file, mapped into memory, read-only. OSError if it cannot be mapped.

    The file is closed. It is unmapped when no array uses it. From Python 3.13 on,
    mmap.mmap(trackfd=False) does the same.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return np.empty(0, np.uint8)
        address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(path))
    buffer = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(buffer, _LIBC.munmap, address, size)
    array = np.frombuffer(memoryview(buffer), np.uint8)
    array.flags.writeable = False
    return array


class MappedText:
    """The documents of Megatron data. It replaces IndexedDataset, with the part that samples use."""

    def __init__(self, prefix: str):
        self.path_prefix = prefix
        index = map_file(prefix + ".idx")
        header = len(_INDEX_HEADER)
        assert index[:header].tobytes() == _INDEX_HEADER, f"{prefix}.idx is not an index of Megatron"
        # Header, version (8 bytes), code of the dtype (1), number of sequences (8) and documents (8).
        self.dtype = np.dtype(DType.dtype_from_code(int(index[header + 8])))
        count = int(np.frombuffer(index, np.uint64, 1, header + 9)[0])
        start = header + 25
        self.sequence_lengths = np.frombuffer(index, np.int32, count, start)
        self.sequence_pointers = np.frombuffer(index, np.int64, count, start + 4 * count)
        self.tokens = map_file(prefix + ".bin")

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return `length` tokens of a document from an offset on. Default: all."""
        count = int(self.sequence_lengths[idx]) - offset if length is None else length
        start = int(self.sequence_pointers[idx]) + offset * self.dtype.itemsize
        return np.frombuffer(self.tokens, self.dtype, int(count), start)


class MappedSamples(GPTDataset):
    """Megatron's samples of one prefix, in Megatron's order.

    If the prefix has a loss mask, loss_mask is that of the labels, and the samples have "ends": bool
    [s], whether a token is the last one of its document. In chats eod may also end each message.
    """

    document_index: np.ndarray
    sample_index: np.ndarray
    shuffle_index: np.ndarray

    def __init__(self, *arguments: object):
        super().__init__(*arguments)
        self.document_index = _without_descriptor(self.document_index)
        self.sample_index = _without_descriptor(self.sample_index)
        self.shuffle_index = _without_descriptor(self.shuffle_index)
        prefix = self.dataset.path_prefix
        self.mask = MappedText(str(mask_prefix(prefix))) if has_mask(prefix) else None

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(idx)
        if self.mask is None:
            return sample
        pieces = self._pieces(idx)
        mask = np.concatenate([self.mask.get(*piece) for piece in pieces])
        # The last of s + 1 tokens is only a label.
        ends = np.zeros(len(mask) - 1, bool)
        ends[np.cumsum([length for *_, length in pieces])[:-1] - 1] = True
        sample["loss_mask"] = torch.from_numpy(mask[1:].astype(np.float32))
        if self.config.eod_mask_loss:
            sample["loss_mask"][ends] = 0
        return {**sample, "ends": torch.from_numpy(ends)}

    def _pieces(self, idx: int) -> list[tuple[int, int, int]]:
        """Return (document, first token, tokens) of each piece of a sample and its last label."""
        row = self.shuffle_index[idx]
        (first, start), (last, end) = self.sample_index[row : row + 2].tolist()
        pieces = []
        for number in range(first, last + 1):
            document = int(self.document_index[number])
            stop = end + 1 if number == last else int(self.dataset.sequence_lengths[document])
            pieces.append((document, start, stop - start))
            start = 0
        return pieces

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> MappedText:
        return MappedText(dataset_path)


def _without_descriptor(array: np.ndarray) -> np.ndarray:
    """Return an array that numpy has mapped, mapped without a descriptor. Other arrays are unchanged."""
    if not isinstance(array, np.memmap) or array.filename is None:
        return array
    file_bytes = map_file(array.filename)
    return np.frombuffer(file_bytes, array.dtype, array.size, array.offset).reshape(array.shape)
