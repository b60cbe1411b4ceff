"""Cost of the importance hooks, or of the masks of a search, in the forward pass.

    python benchmarks/calibration.py out/quickstart/teacher_hf --pairs 10
    python benchmarks/calibration.py out/quickstart/teacher_hf --pairs 10 --masks
    torchrun --nproc-per-node 2 benchmarks/calibration.py out/quickstart/teacher_hf --tp 2

    On a GPU:
    python benchmarks/calibration.py examples/configs/mistral_nemo_12b --layers 8 \\
        --sequence-length 8192 --micro-batch-size 1

It alternates forward passes with and without them in one process, and prints medians and the ratio
of each pair. --masks keeps all layers, which is the slowest candidate. Weights and tokens are
random, which does not change the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path

import torch

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.pruning import ScoreConfig, TargetConfig
from minitron_mp.distributed.world import join_world
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.models.hf_config import read_arch
from minitron_mp.pruning.importance import recording
from minitron_mp.pruning.make_plan import make_plan
from minitron_mp.pruning.masks import masked
from minitron_mp.pruning.scores import random_scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder; only its sizes are read")
    parser.add_argument("--layers", type=int, help="other than the model's")
    parser.add_argument("--transformer-impl", choices=("auto", "local", "transformer_engine"), default="auto")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--masks", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    arch = read_arch(args.model, weights=False)
    arch = arch.resized(num_layers=args.layers or arch.num_layers)
    with join_world(ParallelConfig(tp=args.tp, pp=args.pp, sequence_parallel=args.tp > 1), seed=1) as world:
        options = {
            "precision": args.precision,
            "sequence_length": args.sequence_length,
            "transformer_impl": args.transformer_impl,
        }
        model = build_model(arch, world, ModelOptions(random_weights=True, **options))
        shape = (args.micro_batch_size, args.sequence_length)
        tokens = torch.randint(0, arch.vocab_size, shape)
        batch = {
            "tokens": tokens,
            "labels": tokens,
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(shape[1])[None].expand(shape).contiguous(),
        }
        batches = [batch] * args.pp

        def forward() -> float:
            _settle()
            start = time.perf_counter()
            model.forward(batches)
            _settle()
            return time.perf_counter() - start

        smaller = {
            "hidden_size": arch.hidden_size - 16,
            "ffn_hidden_size": arch.ffn_hidden_size - 16 * args.tp,
            "num_attention_heads": arch.num_attention_heads - arch.num_query_groups,
        }
        plan = make_plan(random_scores(arch), arch, TargetConfig(**smaller), tp=args.tp)

        def hooked() -> float:
            with masked(model, plan) if args.masks else recording(model, ScoreConfig()):
                return forward()

        forward(), hooked()
        pairs = [(forward(), hooked()) for _ in range(args.pairs)]
        if world.is_main:
            plain, with_hooks = (statistics.median(column) for column in zip(*pairs))
            ratios = sorted(b / a for a, b in pairs)
            print(
                f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.precision}, "
                f"{shape[0] * shape[1] * len(batches)} tokens, {args.pairs} pairs"
            )
            what = "masks" if args.masks else "hooks"
            print(f"forward without {what} {plain:.3f} s, with {what} {with_hooks:.3f} s")
            print(
                f"ratio of each pair: median {statistics.median(ratios):.3f} "
                f"(min {ratios[0]:.3f}, max {ratios[-1]:.3f})"
            )


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
