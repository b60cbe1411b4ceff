"""Seconds of a checkpoint of a training run, and the bytes that each rank writes.

    torchrun --nproc-per-node 4 benchmarks/checkpoint.py
    torchrun --nproc-per-node 4 benchmarks/checkpoint.py --tp 2 --folder /lustre/scratch

The model has random weights. A checkpoint has the weights, and three float32 tensors of the
optimizer for each of them. Each save replaces the previous one. The first save also starts Megatron's
writer processes, so it is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch.distributed as dist

from minitron_mp.artifacts.checkpoint import save_checkpoint
from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distributed.world import World, join_world
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.training.optimizer import TrainableModel


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder to write in; default: a temporary folder")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    arch = Arch(
        family="llama",
        num_layers=args.layers,
        hidden_size=args.hidden,
        ffn_hidden_size=4 * args.hidden,
        num_attention_heads=16,
        num_query_groups=4,
        kv_channels=args.hidden // 16,
        vocab_size=16000,
        tied=False,
        max_position_embeddings=4096,
    )
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as own,
        join_world(ParallelConfig(tp=args.tp), seed=1) as world,
    ):
        folders = [own]
        dist.broadcast_object_list(folders)
        measure(world, arch, Path(folders[0]) / "checkpoint", args.saves)


def measure(world: World, arch: Arch, folder: Path, num_saves: int) -> None:
    """Save a checkpoint several times, and print a table on rank 0."""
    settings = DistillConfig()
    options = ModelOptions(precision="bf16", sequence_length=128, training=settings)
    run = TrainableModel(build_model(arch, world, options), settings)
    run.zero_grad()
    run.next_lr()
    run.apply(run.gradient_norm())  # the optimizer allocates its state in the first step
    manifest = Manifest(stage="benchmark", settings={}, inputs={})
    seconds = []
    for number in range(num_saves + 1):
        dist.barrier()
        start = time.perf_counter()
        state = run.state_dict()
        collected = time.perf_counter()
        save_checkpoint(state, folder, manifest)
        if number:
            seconds.append((collected - start, time.perf_counter() - start))
    if not world.is_main:
        return
    num_bytes: Counter[int] = Counter()
    for path in folder.glob("*.distcp"):
        num_bytes[int(path.name.split("_")[2])] += path.stat().st_size
    collect_s, total_s = min(seconds, key=lambda pair: pair[1])
    print(f"tp {world.groups.tp.size()}, dp {world.groups.dp.size()}: {sum(num_bytes.values()) / 1e6:.0f} MB")
    print(f"best of {num_saves}: {total_s:.2f} s, of which {collect_s:.2f} s to join the optimizer's state")
    for rank in range(world.size):
        print(f"rank {rank}: {num_bytes[rank] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
