"""Score, plan and prune from Python with your own batches and any layout.

torchrun --nproc-per-node 3 examples/library.py out/quickstart/teacher out/library_student --tp 3

The first argument is the output of `minitron-mp import`.
"""

import argparse
from pathlib import Path

import torch

from minitron_mp import InputError, ShardedModel, build_model, join_world, make_plan, prune, score
from minitron_mp.artifacts.checkpoint import load_model, save_checkpoint
from minitron_mp.artifacts.manifest import Manifest, require_artifact
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.pruning import ScoreConfig, TargetConfig


def batches(vocab_size: int, rank: int):
    """Return this data parallel rank's microbatches [b, s].

    Replace them with your calibration text.
    """
    tokens = torch.randint(0, vocab_size, (4, 2, 128), generator=torch.Generator().manual_seed(rank))
    positions = torch.arange(128).expand(2, 128).contiguous()
    return [
        {"tokens": t, "labels": t, "loss_mask": torch.ones(t.shape), "position_ids": positions}
        for t in tokens
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    args = parser.parse_args()
    manifest = require_artifact(args.teacher, "import")
    arch = manifest.arch
    with join_world(ParallelConfig(tp=args.tp), seed=1) as w:
        chunks = build_model(arch, w, precision="bf16", sequence_length=128)
        load_model(chunks, args.teacher, w)
        mine = batches(arch.vocab_size, w.groups.dp.rank())
        model = ShardedModel(chunks, arch, w, sequence_length=128, precision="bf16")
        scores = score(model, [mine], ScoreConfig())
        plan = make_plan(scores, arch, TargetConfig(keep=0.75), tp=args.tp)
        made = Manifest(
            stage="prune",
            settings={"keep": 0.75},
            inputs={"teacher": manifest.fingerprint},
            arch=plan.student,
        )
        save_checkpoint(prune(model, plan), args.student, made)
        if w.is_main:
            print(
                f"{args.student}: {plan.student.num_parameters():,} of {arch.num_parameters():,} parameters"
            )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
