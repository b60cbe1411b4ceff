"""Microbatches out of the text on disk: tokenizers, the samples of a part, and which rank reads which sample.

    s sequence_length  b micro_batch_size

samples() opens a part (text.py) with Megatron's GPTDataset. micro_batches() is a pure function of the step, so that an exact
resume needs nothing but the step.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import ConcatDataset, Dataset, Subset

from minitron_mp.data.corpus import prefixes_of, tokens_of
from minitron_mp.data.tokenizer import KEYS, Tokenizer
from minitron_mp.distributed.batch import Batch
from minitron_mp.errors import InputError, must_divide, refuse


def open_samples(
    folder: Path,
    part: str,
    sequence_length: int,
    num_samples: int,
    seed: int,
    tokenizer: Tokenizer,
    *,
    repeat: bool,
    owner: str = "",
) -> Dataset:
    """Map-style dataset of at least num_samples samples of a part; every rank calls it, with or without torch.distributed.

    A sample is {tokens, labels, position_ids: int64 [s], loss_mask: float32 [s]}; labels are the tokens one further.
    The order depends on seed, num_samples and the text. Several prefixes are mixed in proportion to their sizes.
    repeat=False: InputError when one epoch has fewer samples. repeat=True: epochs repeat, as Megatron shuffles them.
    owner: of the index files; two worlds in one job must not write the same ones.
    """
    refuse(
        "there is too little text:",
        too_short_problems(folder, part, sequence_length, 0 if repeat else num_samples),
    )
    prefixes = prefixes_of(folder, part)
    held = [max(0, tokens_of(prefix)[0] - 1) // sequence_length for prefix in prefixes]
    wanted = [-(-num_samples * n // sum(held)) for n in held]  # rounded up, never above held unless repeated
    indices = [folder / "index" / owner / f"{part}_{i}" for i in range(len(prefixes))]
    datasets = [
        _gpt_dataset(p, n, index, sequence_length, seed, tokenizer)
        for p, n, index in zip(prefixes, wanted, indices)
    ]
    return datasets[0] if len(datasets) == 1 else _interleave(datasets, wanted)


def too_short_problems(folder: Path, part: str, sequence_length: int, num_samples: int) -> list[str]:
    """A sentence for the user for each file of a part that has not one sample, or when one epoch has fewer than num_samples."""
    tokens = {prefix: tokens_of(prefix)[0] for prefix in prefixes_of(folder, part)}
    cure = f"one sample is {sequence_length} and a label: lower data.sequence_length or give more text"
    problems = [
        f"{part} text: {prefix} holds {n} tokens, {cure}"
        for prefix, n in tokens.items()
        if n <= sequence_length
    ]
    held = sum(max(0, n - 1) // sequence_length for n in tokens.values())
    if problems or held >= num_samples:
        return problems
    own = part in ("calibration", "train", "valid")
    more = (
        f"more of data.source, a larger data.valid_fraction, or a longer data.{part}"
        if own
        else f"a longer data.held_out.{part}"
    )
    setting = {"calibration": "num_samples of score, depth and search", "train": "the number of samples"}.get(
        part, "evaluate.num_samples"
    )
    return [
        f"{part} text holds {held} samples of {sequence_length} tokens, {num_samples} are wanted; lower {setting} to at most {held}, "
        f"lower data.sequence_length, or give more text ({more})"
    ]


def _gpt_dataset(
    prefix: str, num_samples: int, index: Path, sequence_length: int, seed: int, tokenizer: Tokenizer
) -> Dataset:
    """Megatron's dataset over one prefix: rank 0 writes the index, then a barrier (Megatron's), then the others read it.

    Always anew: a kill while the index is written leaves a part of a file, which Megatron would take for the whole.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    if dist.is_initialized():
        dist.barrier()  # no rank is still opening the index of an earlier call
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.rmtree(index, ignore_errors=True)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend_per_split=[([prefix], None), None, None],
        path_to_cache=str(index),
        tokenizer=tokenizer,
        create_attention_mask=False,
        reset_attention_mask=False,
        reset_position_ids=False,
        eod_mask_loss=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config).build()[0]


def _interleave(datasets: list[Dataset], counts: list[int]) -> Dataset:
    """The first counts[i] samples of dataset i, spread evenly: counts [4, 2] give 0 1 0 0 1 0.

    Not Megatron's BlendedDataset: in 0.16.1 it fails without torch.distributed (fixed in 0.19).
    """
    starts = np.cumsum([0, *map(len, datasets)])
    ids = np.concatenate([start + np.arange(n) for start, n in zip(starts, counts)])
    place = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    return Subset(ConcatDataset(datasets), ids[np.argsort(place, kind="stable")])


def micro_batches(
    dataset: Dataset,
    step: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    limit: int | None = None,
) -> list[Batch]:
    """This data-parallel rank's microbatches of a step (from 0): tokens, labels, position_ids int64 [b, s], loss_mask float32 [b, s].

    The step reads samples [step * gbs, (step + 1) * gbs) in microbatches of consecutive samples; rank m % dp_size has microbatch m.
    Samples from limit on are sample 0 with loss_mask 0, so that every rank has equally many microbatches of a last, partial batch.
    """
    unit = micro_batch_size * dp_size
    if problem := must_divide("global_batch_size", global_batch_size, micro_batch_size, dp_size):
        raise InputError(problem)
    first = step * global_batch_size + dp_rank * micro_batch_size
    starts = range(first, (step + 1) * global_batch_size, unit)
    return [_micro_batch(dataset, range(start, start + micro_batch_size), limit) for start in starts]


def _micro_batch(dataset: Dataset, ids: range, limit: int | None) -> Batch:
    real = [limit is None or i < limit for i in ids]
    rows = [dataset[i if r else 0] for i, r in zip(ids, real)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in KEYS}
    batch["loss_mask"] *= torch.tensor(real)[:, None]
    return cast(Batch, batch)
