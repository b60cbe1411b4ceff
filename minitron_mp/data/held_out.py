"""Held-out parts of a fixed size: documents beyond it go back to the training part."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from pathlib import Path

import numpy as np

from minitron_mp.data.indexed_files import MaskedWriter, append, has_mask, mask_prefix, move
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
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    surplus = None
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
        if surplus is None:
            surplus = MaskedWriter(folder / SURPLUS, np.dtype(dtype))
        for prefix, dataset, kept in zip(parts[part], datasets, _per_dataset(is_kept, datasets)):
            masks = None
            if has_mask(folder / prefix):
                masks = IndexedDataset(str(mask_prefix(folder / prefix)))
            reduced = MaskedWriter(folder / f"{prefix}.new", np.dtype(dtype))
            for number in range(len(dataset)):
                writer = reduced if kept[number] else surplus
                writer.add(dataset[number], None if masks is None else masks[number])
            reduced.close()
        del datasets, dataset, masks
        for prefix in parts[part]:
            move(folder / f"{prefix}.new", folder / prefix)
    if surplus is not None:
        surplus.close()
        append(folder / parts["train"][-1], folder / SURPLUS, np.dtype(dtype))


def _choose(lengths: np.ndarray, num_tokens: int, seed: int) -> np.ndarray:
    """Return which documents are kept: random ones, until they have num_tokens tokens."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    before = np.cumsum(lengths[order], dtype=np.int64) - lengths[order]
    is_kept = np.zeros(len(lengths), bool)
    is_kept[order[before < num_tokens]] = True
    return is_kept


def _per_dataset(is_kept: np.ndarray, datasets: Sequence[Sized]) -> list[np.ndarray]:
    return np.split(is_kept, np.cumsum([len(dataset) for dataset in datasets])[:-1])
