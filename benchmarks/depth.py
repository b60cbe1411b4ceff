"""Cost of a block search over layers, against one evaluation per candidate.

    python benchmarks/depth.py out/quickstart/teacher_hf --block 8 --tokens 16384
    torchrun --nproc-per-node 2 benchmarks/depth.py out/quickstart/teacher_hf --pp 2

It prints the number of layer forwards, counted by hooks, and the time. "one by one" is the number
of kept layers, summed over candidates. Weights and tokens are random, which changes neither.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.pruning import DepthConfig
from minitron_mp.distributed.world import join_world
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.models.hf_config import read_arch
from minitron_mp.pruning.ablation import losses_without
from minitron_mp.pruning.depth import depth_candidates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder; only its sizes are read")
    parser.add_argument("--block", type=int, default=8, help="layers that go")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    arch = read_arch(args.model)
    with join_world(ParallelConfig(tp=args.tp, pp=args.pp, sequence_parallel=args.tp > 1), seed=1) as world:
        model = build_model(
            arch,
            world,
            ModelOptions(precision=args.precision, sequence_length=args.sequence_length, random_weights=True),
        )
        shape = (args.micro_batch_size, args.sequence_length)
        tokens = torch.randint(0, arch.vocab_size, shape, generator=torch.Generator().manual_seed(1))
        batch = {
            "tokens": tokens,
            "labels": tokens,
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(shape[1])[None].expand(shape).contiguous(),
        }
        groups = [[batch] * args.pp] * (args.tokens // tokens.numel() // args.pp)
        calls: list[int] = []
        for chunk in model.chunks:
            for block in chunk.eval().decoder.layers:
                block.register_forward_hook(lambda *_: calls.append(1))
        candidates = depth_candidates(DepthConfig(method="block"), arch.num_layers, args.block)

        def measure(which: list[frozenset[int]], batches: list) -> tuple[float, int]:
            """Seconds, and layer forwards over all pipeline stages."""
            calls.clear()
            dist.barrier()
            start = time.perf_counter()
            losses_without(model, batches, which)
            count = torch.tensor(len(calls), device=world.device)
            dist.all_reduce(count, group=world.groups.pp)
            return time.perf_counter() - start, int(count)

        measure(candidates[:1], groups[:1])
        seconds, count = measure(candidates, groups)
        microbatches, kept = len(groups) * args.pp, arch.num_layers - args.block
        naive = len(candidates) * kept * microbatches
        if world.is_main:
            shown = f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.precision}, "
            shown += f"{microbatches * tokens.numel()} tokens"
            print(f"{shown}, {len(candidates)} blocks of {args.block} of {arch.num_layers} layers")
            each = 1000 * seconds / count
            print(
                f"layer forwards {count}, one by one {naive}: {count / naive:.3f}; "
                f"{seconds:.1f} s, {each:.1f} ms a layer forward"
            )


if __name__ == "__main__":
    main()
