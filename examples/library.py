"""Score, plan and prune from Python with your own batches and any layout.

torchrun --nproc-per-node 3 examples/library.py out/quickstart/teacher out/library_student --tp 3

The first argument is the output of `minitron-mp import`.
"""

import argparse
from pathlib import Path

import torch

from minitron_mp import InputError, join_world, load_model, make_plan, prune, save_state, score
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.pruning import TargetConfig


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
    with join_world(ParallelConfig(tp=args.tp), seed=1) as w:
        teacher = load_model(args.teacher, w, sequence_length=128)
        calibration = batches(teacher.arch.vocab_size, w.groups.dp.rank())
        scores = score(teacher, [calibration])
        plan = make_plan(scores, teacher.arch, TargetConfig(keep=0.75), tp=args.tp)
        state = prune(teacher, plan)
        save_state(state, plan.student, args.student, made_from=[args.teacher], settings={"keep": 0.75})
        if w.is_main:
            print(
                f"{args.student}: {plan.student.num_parameters():,} of {teacher.arch.num_parameters():,} parameters"
            )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
