"""Start-up time and descriptors of a blend of many prefixes, and the time of a step's samples.

(ulimit -n 1024; python benchmarks/prefixes.py)
(ulimit -n 1024; torchrun --nproc-per-node 2 benchmarks/prefixes.py --prefixes 300)
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from minitron_mp.config.data import DataConfig
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.data.batches import Corpus, microbatches, open_samples
from minitron_mp.data.corpus import PARTS_FILE
from minitron_mp.data.tokenizer import Tokenizer
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.distributed.world import join_world

LENGTH = 512
DOCUMENT = 900
"""Tokens of a document."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prefixes", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens of a prefix")
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples of the run")
    options = parser.parse_args()
    with join_world(ParallelConfig(), seed=1) as world, tempfile.TemporaryDirectory() as temporary:
        folder = Path(on_rank_0(lambda: temporary))
        names = [str(folder / f"set{number}") for number in range(options.prefixes)]
        on_rank_0(lambda: _write(folder, names, options.tokens), takes_long=True)
        data = DataConfig(
            calibration=names[:1], valid=names[:1], train=dict.fromkeys(names, 1), sequence_length=LENGTH
        )
        tokenizer = Tokenizer(lambda texts: [], 50_000, 0)
        corpus = Corpus(folder, tokenizer, LENGTH, 1, data=data)
        descriptors = _open_descriptors()
        start = time.perf_counter()
        samples = open_samples(corpus, "train", options.samples, repeat=True)
        seconds = time.perf_counter() - start
        opened = _open_descriptors() - descriptors
        start = time.perf_counter()
        sizes = {"global_batch_size": 64 * dist.get_world_size(), "micro_batch_size": 8}
        microbatches(samples, 0, **sizes, dp_rank=dist.get_rank(), dp_size=dist.get_world_size())
        step_s = time.perf_counter() - start
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        rows: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(rows, (seconds, opened, step_s))
        if world.is_main:
            print(f"{options.prefixes} prefixes of {options.tokens:,} tokens, limits {limit}")
        dist.barrier()
        if world.is_main:
            for rank, (seconds, opened, step_s) in enumerate(rows):
                print(
                    f"rank {rank}: open {seconds:.2f} s, {opened} more descriptors, 64 samples {step_s:.3f} s"
                )


def _write(folder: Path, names: list[str], num_tokens: int) -> None:
    """Write the prefixes: one is written, and the others are links to it."""
    builder = IndexedDatasetBuilder(f"{names[0]}.bin", dtype=DType.optimal_dtype(50_000))
    ids = np.random.default_rng(1).integers(1, 50_000, num_tokens)
    for document in np.array_split(ids, max(1, num_tokens // DOCUMENT)):
        builder.add_document(document, [len(document)])
    builder.finalize(f"{names[0]}.idx")
    for name in names[1:]:
        for suffix in (".bin", ".idx"):
            Path(name + suffix).symlink_to(names[0] + suffix)
    parts = {"train": [[name] for name in names], "calibration": names[:1], "valid": names[:1]}
    (folder / PARTS_FILE).write_text(json.dumps(parts))


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


if __name__ == "__main__":
    main()
