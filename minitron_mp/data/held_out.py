"""Held-out parts of a fixed size: documents beyond it go back to the training part."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from pathlib import Path

import numpy as np

from minitron_mp.data.indexed_files import append
from minitron_mp.errors import InputError

HELD_OUT = ("calibration", "valid")

SURPLUS = "surplus"
"""Prefix of the documents that go back, until they are in the training part."""


def limit_held_out(folder: Path, parts: dict[str, list[str]], num_tokens: int, seed: int) -> None:
    """Reduce the held-out parts in the folder to num_tokens tokens each.

    The other documents are appended to the training part. parts: part -> its prefixes, relative to
    the folder. The last document of a part may exceed num_tokens. seed: of the choice of documents,
    which come from all of the text. InputError if a part has fewer tokens.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    builder = None
    for part in HELD_OUT:
        datasets = [IndexedDataset(str(folder / prefix)) for prefix in parts[part]]
        lengths = np.concatenate([dataset.sequence_lengths for dataset in datasets])
        if lengths.sum() < num_tokens:
            raise InputError(
                f"the {part} part has {lengths.sum():,} tokens, and data.valid_tokens is {num_tokens:,}; "
                "raise data.valid_fraction, or lower data.valid_tokens"
            )
        is_kept = _choose(lengths, num_tokens, seed)
        if is_kept.all():
            continue
        dtype = datasets[0].index.dtype
        if builder is None:
            builder = IndexedDatasetBuilder(str(folder / f"{SURPLUS}.bin"), dtype=dtype)
        for prefix, dataset, kept in zip(parts[part], datasets, _per_dataset(is_kept, datasets)):
            reduced = IndexedDatasetBuilder(str(folder / f"{prefix}.new.bin"), dtype=dtype)
            for number in range(len(dataset)):
                ids = dataset[number]
                (reduced if kept[number] else builder).add_document(ids, [len(ids)])
            reduced.finalize(str(folder / f"{prefix}.new.idx"))
        del datasets, dataset
        for prefix in parts[part]:
            for suffix in (".bin", ".idx"):
                (folder / f"{prefix}.new{suffix}").replace(folder / f"{prefix}{suffix}")
    if builder is not None:
        builder.finalize(str(folder / f"{SURPLUS}.idx"))
        append(folder / parts["train"][-1], folder / SURPLUS, np.dtype(dtype))
        for suffix in (".bin", ".idx"):
            (folder / f"{SURPLUS}{suffix}").unlink()


def _choose(lengths: np.ndarray, num_tokens: int, seed: int) -> np.ndarray:
    """Return which documents are kept: random ones, until they have num_tokens tokens."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    before = np.cumsum(lengths[order], dtype=np.int64) - lengths[order]
    is_kept = np.zeros(len(lengths), bool)
    is_kept[order[before < num_tokens]] = True
    return is_kept


def _per_dataset(is_kept: np.ndarray, datasets: Sequence[Sized]) -> list[np.ndarray]:
    return np.split(is_kept, np.cumsum([len(dataset) for dataset in datasets])[:-1])
