"""Speed and memory of prune(): bytes of teacher weights per second, and its peak memory.

    python benchmarks/slicing.py
    torchrun --nproc-per-node 2 benchmarks/slicing.py --tp 2

The model has random weights, 8 layers, and about a third of the width of an 8B model. Width and
heads are pruned. The peak is the memory beyond the model, in units of its largest weight, on the
rank where it is highest. It is read from the process every millisecond, or from the allocator on a
GPU.
"""

from __future__ import annotations

import argparse
import gc
import threading
import time
import warnings

import psutil
import torch
import torch.distributed as dist

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.pruning import TargetConfig
from minitron_mp.distributed.process_groups import host_group
from minitron_mp.distributed.world import join_world
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.pruning.make_plan import make_plan
from minitron_mp.pruning.scores import random_scores
from minitron_mp.pruning.slicing import prune


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tp", type=int, default=1)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    sizes = {
        "hidden_size": 1536,
        "ffn_hidden_size": 5376,
        "num_attention_heads": 16,
        "num_query_groups": 4,
        "kv_channels": 96,
        "vocab_size": 32000,
    }
    arch = Arch(family="llama", num_layers=args.layers, tied=False, max_position_embeddings=4096, **sizes)
    plan = make_plan(
        random_scores(arch),
        arch,
        TargetConfig(hidden_size=1024, ffn_hidden_size=3584, num_attention_heads=12),
        args.tp,
    )
    with join_world(ParallelConfig(tp=args.tp), seed=1) as world:
        model = build_model(arch, world, ModelOptions(precision="bf16", sequence_length=128))
        weights = [p for chunk in model.chunks for p in chunk.parameters()]
        for weight in weights:
            weight.data.normal_()  # touch the memory, or it is not there yet
        total, largest = sum(w.nbytes for w in weights), max(w.nbytes for w in weights)
        del weights, weight
        gc.collect()
        with Peak(world.device) as peak:
            start = time.perf_counter()
            student = prune(model, plan)
            seconds = time.perf_counter() - start
        numbers = torch.tensor([peak.beyond / largest, seconds], dtype=torch.float64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=host_group())
        if world.is_main:
            kept = sum(t.data.nbytes for t in student.values())
            print(
                f"tp {args.tp}: {total / 2**20:.0f} MiB of weights per rank, "
                f"largest {largest / 2**20:.0f} MiB, student {kept / 2**20:.0f} MiB"
            )
            print(
                f"{total / numbers[1] / 1e9:.2f} GB/s per rank ({numbers[1]:.2f} s); "
                f"peak beyond the model {numbers[0]:.2f} x the largest weight"
            )


class Peak:
    """Peak memory of this process above its start while the block runs, in bytes."""

    def __init__(self, device: torch.device):
        self.device, self.beyond, self.process = device, 0, psutil.Process()

    def __enter__(self) -> Peak:
        self.base, self.done = self._now(), threading.Event()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        if self.device.type == "cuda":
            self.beyond = torch.cuda.max_memory_allocated() - self.base

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.beyond = max(self.beyond, self._now() - self.base)

    def _now(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else self.process.memory_info().rss


if __name__ == "__main__":
    main()
