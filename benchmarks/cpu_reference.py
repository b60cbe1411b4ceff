"""Distillation speed of this library's train() and of a plain transformers loop.

    python benchmarks/cpu_reference.py out/quickstart/teacher_hf --pairs 10

Both loops distil the same teacher into a student of the same sizes, on the same random tokens, in
bf16. Their steps alternate in one process. The library has bf16 weights, and float32 main weights
in the optimizer. The plain loop (experiments/paper_claims) has float32 weights under autocast,
fused AdamW, a bf16 teacher, and KL(teacher || student) from log_softmax in float32. It prints
tokens/s of the median steps and the ratio of each pair.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "paper_claims"))

from pace import format_ratios, in_turn

from minitron_mp import make_recipe, run_stage
from minitron_mp.workflow.graph import StageGraph


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path, help="Hugging Face folder")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--ffn-hidden-size", type=int, default=1152)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=10, help="of steps, after two of warm-up")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    config = json.loads((args.teacher / "config.json").read_text())
    config |= {
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
    }
    config |= {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
    }  # a Llama's heads must fill its hidden size
    with tempfile.TemporaryDirectory() as scratch:
        recipe = make_recipe(
            {
                "model": str(args.teacher),
                "output": scratch,
                "data": {"sequence_length": args.sequence_length},
                "target": {"hidden_size": args.hidden_size},
                "distill": {
                    "global_batch_size": args.micro_batch_size,
                    "micro_batch_size": args.micro_batch_size,
                    "logits_precision": "bf16",  # as the loop, whose logits are bf16 under autocast
                },
            }
        )
        run_stage("import", recipe)
        found = in_turn(recipe, config, StageGraph(recipe).paths["import"], pairs=args.pairs)
    tokens = args.micro_batch_size * args.sequence_length
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{tokens} tokens a step, {args.pairs} pairs of steps"
    )
    for name, speed in found["tokens_per_s"].items():
        print(f"{name:14s} {speed:7.1f} tokens/s")
    print(f"speed of minitron_mp over the loop, pair by pair: median {format_ratios(found['ratios'])}")


if __name__ == "__main__":
    main()
