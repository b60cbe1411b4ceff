"""Samples of a part of the text, and the microbatches that each rank reads.

    s sequence_length  b micro_batch_size

open_samples() opens a part (corpus.py) with Megatron's GPTDataset. microbatches() is a pure
function of the step, so an exact resume needs only the step.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import ConcatDataset, Dataset, Subset

from minitron_mp.data.corpus import prefixes_of, tokens_of
from minitron_mp.data.sources import PARTS
from minitron_mp.data.tokenizer import Tokenizer
from minitron_mp.distributed.batch import Batch
from minitron_mp.errors import InputError, must_divide, os_error_text, refuse

KEYS = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass(frozen=True)
class Corpus:
    """Tokenized text, and the settings of its samples."""

    folder: Path
    """Folder that tokenize_corpus() wrote."""
    tokenizer: Tokenizer
    sequence_length: int
    seed: int
    index_owner: str = ""
    """Subfolder for index files. Worlds of one job use different ones and never share a file."""


def open_samples(corpus: Corpus, part: str, num_samples: int, *, repeat: bool) -> Dataset:
    """Open at least num_samples samples of a part as a map-style dataset.

    Every rank must call it; it also works without torch.distributed. A sample is {tokens, labels,
    position_ids: int64 [s], loss_mask: float32 [s]}. labels are the tokens shifted by one. The
    order depends on seed, num_samples and the text. Several prefixes are mixed in proportion to
    their sizes. repeat: allow several epochs, each in Megatron's shuffled order. Without repeat,
    InputError if one epoch has fewer samples.
    """
    length = corpus.sequence_length
    problems = too_short_problems(corpus.folder, part, length, 0 if repeat else num_samples)
    refuse("there is too little text:", problems)
    prefixes = prefixes_of(corpus.folder, part)
    available = [max(0, tokens_of(prefix)[0] - 1) // length for prefix in prefixes]
    # The counts are rounded up. Without repeat they never exceed the available samples.
    counts = [-(-num_samples * count // sum(available)) for count in available]
    datasets = []
    for number, (prefix, count) in enumerate(zip(prefixes, counts)):
        index = corpus.folder / "index" / corpus.index_owner / f"{part}_{number}"
        datasets.append(_gpt_dataset(corpus, prefix, count, index))
    return datasets[0] if len(datasets) == 1 else _interleave(datasets, counts)


def too_short_problems(
    folder: Path, part: str, sequence_length: int, num_samples: int, *, setting: str = ""
) -> list[str]:
    """Return a sentence for each file that is shorter than a sample, or if samples are too few.

    setting: the setting with the number of samples, for the advice. Default: that of the part.
    """
    tokens = {prefix: tokens_of(prefix)[0] for prefix in prefixes_of(folder, part)}
    problems = [
        f"{part} text: {prefix} has {count} tokens, one sample needs {sequence_length} and a label: lower "
        "data.sequence_length or give more text"
        for prefix, count in tokens.items()
        if count <= sequence_length
    ]
    available = sum(max(0, count - 1) // sequence_length for count in tokens.values())
    if problems or available >= num_samples:
        return problems
    if part in PARTS:
        advice = f"more of data.source, a larger data.valid_fraction, or a longer data.{part}"
    else:
        advice = f"a longer data.held_out.{part}"
    settings = {"calibration": "num_samples of score, depth and search", "train": "the number of samples"}
    setting = setting or settings.get(part, "evaluate.num_samples")
    return [
        f"{part} text has {available} samples of {sequence_length} tokens, {num_samples} are needed: lower "
        f"{setting} to at most {available}, lower data.sequence_length, or give more text ({advice})"
    ]


def _gpt_dataset(corpus: Corpus, prefix: str, num_samples: int, index: Path) -> Dataset:
    """Return Megatron's dataset over one prefix.

    Rank 0 writes the index. After a barrier the other ranks read it. The index is always rewritten,
    because a kill can leave a partial file that Megatron would accept.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    if dist.is_initialized():
        dist.barrier()  # wait for ranks that still open the index of an earlier call
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.rmtree(index, ignore_errors=True)
    config = GPTDatasetConfig(
        random_seed=corpus.seed,
        sequence_length=corpus.sequence_length,
        blend_per_split=[([prefix], None), None, None],
        path_to_cache=str(index),
        tokenizer=corpus.tokenizer,
        create_attention_mask=False,
        reset_attention_mask=False,
        reset_position_ids=False,
        eod_mask_loss=False,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config)
    try:
        return builder.build()[0]
    except Exception as error:
        # Megatron replaces an OSError, such as a full disk, by a plain Exception on rank 0.
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise InputError(
            f"{index}, the order of the samples, cannot be written: {os_error_text(cause)}; check the disk"
        ) from error


def _interleave(datasets: list[Dataset], counts: list[int]) -> Dataset:
    """Return the first counts[i] samples of dataset i, mixed evenly: [4, 2] gives 0 1 0 0 1 0.

    Megatron's BlendedDataset is not used: in 0.16.1 it fails without torch.distributed (fixed in
    0.19).
    """
    starts = np.cumsum([0, *map(len, datasets)])
    ids = np.concatenate([start + np.arange(count) for start, count in zip(starts, counts)])
    positions = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return Subset(ConcatDataset(datasets), ids[np.argsort(positions, kind="stable")])


def microbatches(
    dataset: Dataset,
    step: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    limit: int | None = None,
) -> list[Batch]:
    """Return the microbatches of this data-parallel rank in a step. Steps count from 0.

    Each has tokens, labels, position_ids int64 [b, s] and loss_mask float32 [b, s]. A step reads
    samples [step * global_batch_size, (step + 1) * global_batch_size). Microbatches contain
    consecutive samples, and rank m % dp_size has microbatch m. limit: number of samples of the
    last, partial batch. Later samples are replaced by sample 0 with loss_mask 0, so that all ranks
    have the same number of microbatches.
    """
    problem = must_divide("global_batch_size", global_batch_size, micro_batch_size, dp_size)
    if problem:
        raise InputError(problem)
    first = step * global_batch_size + dp_rank * micro_batch_size
    starts = range(first, (step + 1) * global_batch_size, micro_batch_size * dp_size)
    return [_microbatch(dataset, range(start, start + micro_batch_size), limit) for start in starts]


def _microbatch(dataset: Dataset, ids: range, limit: int | None) -> Batch:
    is_real = [limit is None or i < limit for i in ids]
    rows = [dataset[i if real else 0] for i, real in zip(ids, is_real)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in KEYS}
    batch["loss_mask"] *= torch.tensor(is_real)[:, None]
    return cast(Batch, batch)
