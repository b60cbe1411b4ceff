"""The Minitron method from Python: score, plan, prune, distil and export a real model.

torchrun --nproc-per-node 1 examples/library.py out/quickstart/teacher_hf out/library

The first argument is a Hugging Face folder. Random tokens stand for your text.
"""

import sys
from pathlib import Path

import torch

import minitron_mp as mm

LENGTH, STEPS = 128, 4


def batches(step: int) -> list[mm.Batch]:
    """Return this data-parallel rank's microbatches [b, s] of a step; replace them with your text."""
    tokens = torch.randint(0, 200, (2, 2, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    positions = torch.arange(LENGTH).expand(2, LENGTH).contiguous()
    rest: mm.Batch = {"loss_mask": torch.ones(2, LENGTH), "position_ids": positions}
    return [{"tokens": t[:, :-1], "labels": t[:, 1:], **rest} for t in tokens]


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    model, out = map(Path, sys.argv[1:])
    settings = mm.DistillConfig(steps=STEPS, warmup_steps=1, global_batch_size=4, micro_batch_size=2)
    with mm.join_world(mm.ParallelConfig(), seed=1) as world:
        mm.import_hf(model, out / "teacher")
        teacher = mm.load_model(out / "teacher", world, sequence_length=LENGTH)
        scores = mm.score(teacher, [batches(step) for step in range(STEPS)])
        plan = mm.make_plan(scores, teacher.arch, mm.TargetConfig(keep=0.75))
        pruned = mm.prune(mm.load_model(out / "teacher", world, sequence_length=LENGTH), plan)
        mm.save_state(pruned, plan.student, out / "student", made_from=[out / "teacher"])
        student = mm.load_model(out / "student", world, sequence_length=LENGTH, training=settings)
        mm.distill(student, mm.ColocatedTeacher(teacher), batches, settings, out=out / "distilled")
        mm.export_hf(out / "distilled", out / "student_hf")
        if world.is_main:
            print(f"{out}/student_hf: {plan.student.num_parameters():,} parameters")


if __name__ == "__main__":
    try:
        main()
    except mm.InputError as error:
        raise SystemExit(f"error: {error}") from None
