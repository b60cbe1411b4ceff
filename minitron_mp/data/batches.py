"""Samples of a part of the text, and the microbatches that each rank reads.

    s sequence_length  b micro_batch_size

open_samples() opens a part (corpus.py) with Megatron's GPTDataset. microbatches() is a pure
function of the step, so an exact resume needs only the step.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from minitron_mp.config.data import DataConfig
from minitron_mp.data.blend import BlendedText, blend_problem, blend_samples
from minitron_mp.data.corpus import check_masks, prefixes_of, texts_of, tokens_of
from minitron_mp.data.sources import PARTS
from minitron_mp.data.tokenizer import Tokenizer
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.process_groups import host_barrier
from minitron_mp.errors import InputError, must_divide, os_error_text, refuse

KEYS = ("tokens", "labels", "loss_mask", "position_ids")

BUILDER_THREADS = 8
"""Threads of a rank that open prefixes."""


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
    data: DataConfig | None = None
    """Section of the recipe with the shares of blends and the masks. Without it, size decides."""
    run_samples: int | None = None
    """Samples of the run for which `data` gives epochs and tokens. Default: those that are opened."""

    def blend(self, part: str) -> list[BlendedText] | None:
        """Return the texts of a blend, or None if the part is not a blend."""
        return None if self.data is None else blend_of(self.folder, self.data, part)

    def text_weights(self, blend: Sequence[BlendedText], num_samples: int) -> list[float]:
        """Return a weight for each text of a blend of which num_samples samples are opened."""
        if all(text.share.unit == "weight" for text in blend):
            # Rounding would let Megatron's order depend on num_samples, and so on the steps of the run.
            return [text.share.amount for text in blend]
        return blend_samples(blend, self.run_samples or num_samples, self.sequence_length)


def blend_of(folder: Path, data: DataConfig, part: str) -> list[BlendedText] | None:
    """Return the texts of a blend with their samples per epoch, or None if the part is not a blend."""
    shares = data.shares(part)
    if shares is None:
        return None
    return [
        BlendedText(name, share, sum(_epoch_samples(prefix, data.sequence_length) for prefix in prefixes))
        for name, share, prefixes in zip(getattr(data, part), shares, texts_of(folder, part))
    ]


def open_samples(corpus: Corpus, part: str, num_samples: int, *, repeat: bool) -> Dataset:
    """Open at least num_samples samples of a part as a map-style dataset.

    Every rank must call it. A part of one prefix also works without torch.distributed. A sample is
    {tokens, labels, position_ids: int64 [s], loss_mask: float32 [s]}, with data.document_mask also
    documents: int64 [s]. labels are the tokens shifted by one. loss_mask is 1 for labels that count.
    The order depends on seed, num_samples, the text and the shares.

    Several prefixes are mixed evenly: in proportion to their sizes, or to the shares of the texts of
    a blend, whose prefixes are mixed in proportion to their sizes. repeat: allow several epochs, each
    in Megatron's shuffled order. Without repeat, InputError if one epoch has fewer samples.
    InputError for shares that do not fit num_samples.
    """
    length = corpus.sequence_length
    problems = too_short_problems(corpus.folder, part, length, 0 if repeat else num_samples)
    blend = corpus.blend(part)
    if blend and not problems:
        problems = blend_problems(part, blend, corpus.run_samples or num_samples, length, repeat=repeat)
    refuse("there is too little text:" if not blend else "the text cannot be blended:", problems)
    check_masks(corpus.folder, part)
    prefixes = prefixes_of(corpus.folder, part)
    if len(prefixes) == 1 or not (repeat or blend):
        weights = None  # one epoch of each prefix, in proportion to its size
    else:
        weights = _prefix_weights(corpus, part, blend, num_samples)
    index = corpus.folder / "index" / corpus.index_owner / part
    return _blended_dataset(corpus, prefixes, weights, num_samples, index)


def epochs_in_order(corpus: Corpus, part: str, num_samples: int) -> list[tuple[int, bool]]:
    """Return for each prefix of open_samples(repeat=True) what the order of its samples depends on.

    That is the number of its epochs, and whether the last one is shuffled by itself, which
    Megatron's GPTDataset does if less than 80 % of it is read.
    """
    prefixes, shares = prefixes_of(corpus.folder, part), [num_samples]
    if len(prefixes) > 1:
        weights = _prefix_weights(corpus, part, corpus.blend(part), num_samples)
        surplus = 1 + len(prefixes) / num_samples  # as in _blended_dataset()
        shares = [math.ceil(math.ceil(num_samples * weight / sum(weights)) * surplus) for weight in weights]
    rows = []
    for prefix, share in zip(prefixes, shares):
        tokens = _num_tokens(prefix)
        epochs = -(-(share * corpus.sequence_length + 1) // tokens)
        last = share - ((epochs - 1) * tokens - 1) // corpus.sequence_length
        is_separate = epochs > 1 and last < int(0.8 * ((tokens - 1) // corpus.sequence_length))
        rows.append((epochs, is_separate))
    return rows


def blend_problems(
    part: str, blend: Sequence[BlendedText], num_samples: int, sequence_length: int, *, repeat: bool
) -> list[str]:
    """Return a sentence if the shares do not fit the samples; without repeat also for short texts."""
    problem = blend_problem(part, blend, num_samples, sequence_length)
    if problem:
        return [problem]
    if repeat:
        return []
    samples = blend_samples(blend, num_samples, sequence_length)
    return [
        f"data.{part}: {text.name} has {text.epoch_samples:,} samples of {sequence_length} tokens, its share "
        f"of {num_samples:,} samples is {count:,.0f}: lower its share, or give more text"
        for text, count in zip(blend, samples)
        if count > text.epoch_samples
    ]


def too_short_problems(
    folder: Path, part: str, sequence_length: int, num_samples: int, *, setting: str = ""
) -> list[str]:
    """Return a sentence for each file that is shorter than a sample, or if samples are too few.

    setting: the setting with the number of samples, for the advice. Default: that of the part.
    """
    tokens = {prefix: _num_tokens(prefix) for prefix in prefixes_of(folder, part)}
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


def _epoch_samples(prefix: str, sequence_length: int) -> int:
    return max(0, _num_tokens(prefix) - 1) // sequence_length


def _num_tokens(prefix: str) -> int:
    """Return the number of tokens of a prefix. Its index is read once, unless the files change."""
    try:
        stats = [os.stat(prefix + suffix) for suffix in (".bin", ".idx")]
    except OSError:
        return tokens_of(prefix)[0]  # raises InputError
    return _tokens_of_files(prefix, *((stat.st_mtime_ns, stat.st_size) for stat in stats))


@functools.lru_cache(maxsize=4096)
def _tokens_of_files(prefix: str, *stamps: tuple[int, int]) -> int:
    return tokens_of(prefix)[0]


def _prefix_weights(
    corpus: Corpus, part: str, blend: Sequence[BlendedText] | None, num_samples: int
) -> list[float]:
    """Return the weight of each prefix: its size, or its part of the samples of its text."""
    weights: list[float] = []
    texts = texts_of(corpus.folder, part)
    of_texts = corpus.text_weights(blend, num_samples) if blend else None
    for number, prefixes in enumerate(texts):
        sizes = [_epoch_samples(prefix, corpus.sequence_length) for prefix in prefixes]
        scale = 1.0 if of_texts is None else of_texts[number] / sum(sizes)
        weights += [size * scale for size in sizes]
    return weights


def _blended_dataset(
    corpus: Corpus, prefixes: list[str], weights: list[float] | None, num_samples: int, index: Path
) -> Dataset:
    """Return Megatron's dataset over the prefixes.

    Rank 0 writes the index. After a barrier the other ranks read it. The index is always rewritten,
    because a kill can leave a partial file that Megatron would accept.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from minitron_mp.data.mapped_samples import MappedSamples

    if dist.is_initialized():
        host_barrier()  # wait for ranks that still open the index of an earlier call
    elif len(prefixes) > 1:  # fixed in Megatron-Core 0.19
        raise InputError(
            f"{index.name} text has {len(prefixes)} prefixes, which Megatron-Core mixes in a job of ranks "
            "only; call it inside join_world()"
        )
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.rmtree(index, ignore_errors=True)
    config = GPTDatasetConfig(
        random_seed=corpus.seed,
        sequence_length=corpus.sequence_length,
        blend_per_split=[(prefixes, weights), None, None],
        path_to_cache=str(index),
        tokenizer=corpus.tokenizer,
        create_attention_mask=False,
        reset_attention_mask=False,
        reset_position_ids=False,
        eod_mask_loss=corpus.data is not None and corpus.data.eod_mask_loss,
        num_dataset_builder_threads=min(BUILDER_THREADS, len(prefixes)),
        # Megatron rounds the samples of each prefix up, so its blend has up to one more sample per
        # prefix. With this surplus no prefix has too few samples for it.
        mid_level_dataset_surplus=len(prefixes) / num_samples,
    )
    builder = BlendedMegatronDatasetBuilder(MappedSamples, [num_samples, 0, 0], lambda: True, config)
    has_documents = corpus.data is not None and corpus.data.document_mask
    try:
        samples = builder.build()[0]
        return _WithDocuments(samples, corpus.tokenizer.eod) if has_documents else samples
    except Exception as error:
        # Megatron replaces an OSError, such as a full disk, by a plain Exception on rank 0.
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise InputError(
            f"{index}, the order of the samples, cannot be written: {os_error_text(cause)}; check the disk"
        ) from error


class _WithDocuments(Dataset):
    """Samples with the number of the document of each token."""

    def __init__(self, samples: Dataset, eod: int):
        self.samples, self.eod = samples, eod

    def __len__(self) -> int:
        return len(cast(Sized, self.samples))

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        sample = self.samples[number]
        is_end = sample["ends"] if "ends" in sample else sample["tokens"] == self.eod
        return {**sample, "documents": is_end.cumsum(0) - is_end.long()}


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

    Each has tokens, labels, position_ids int64 [b, s] and loss_mask float32 [b, s], and documents if
    the samples have them. A step reads
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
    keys = [*KEYS, "documents"] if "documents" in rows[0] else KEYS
    batch = {key: torch.stack([row[key] for row in rows]) for key in keys}
    batch["loss_mask"] *= torch.tensor(is_real)[:, None]
    return cast(Batch, batch)
