"""What the tests of validation during training run on the ranks of a pool."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from cases import Layout, make_samples, microbatches, settings
from model_workers import joined, load
from training_workers import Runner, small_buckets

from minitron_mp.distillation.teacher import ColocatedTeacher
from minitron_mp.evaluation.quality import compare
from minitron_mp.models.arch import Arch
from minitron_mp.models.sharded_model import ShardedModel

INTERVAL = {"valid_interval": 1, "checkpoint_interval": 1}


def validated(
    layout: Layout,
    arch: Arch,
    teacher: Path,
    student_arch: Arch,
    student: Path,
    output: Path,
    overlap: bool,
) -> dict[str, Any]:
    """Train with and without validation, and measure the saved models separately."""
    chosen = settings(layout).model_copy(update={**INTERVAL, "overlap": overlap, "keep_checkpoints": 9})
    with joined(layout) as world, small_buckets():
        signals = ColocatedTeacher(load(arch, teacher, world))
        dp = world.groups.dp
        held_out = [microbatches(make_samples(arch, 50, 4), chosen.micro_batch_size, dp.rank(), dp.size())]

        def measure(model: ShardedModel) -> Any:
            return compare({"model": model}, signals, held_out)["model"]

        run = Runner(world, signals, chosen, measure=measure)(student_arch, student, output / "validated")
        plain = Runner(world, signals, chosen)(student_arch, student, output / "plain")
        again = [
            measure(load(student_arch, output / "validated" / f"step_{step:08d}", world)) for step in (1, 2)
        ]
        return {
            "metrics": run.metrics,
            "plain": plain.metrics,
            "bitwise": all(map(torch.equal, run.weights, plain.weights)),
            "again": again,
        }


def with_given_losses(
    layout: Layout,
    arch: Arch,
    teacher: Path,
    student_arch: Arch,
    student: Path,
    output: Path,
    losses: list[float],
    changes: dict[str, Any],
) -> dict[str, Any]:
    """Train with these held-out losses: uninterrupted, and resumed after the second step.

    Returns the steps and the checkpoints of both runs.
    """
    chosen = settings(layout).model_copy(update={**INTERVAL, "keep_checkpoints": 1, **changes})
    with joined(layout) as world:
        signals = ColocatedTeacher(load(arch, teacher, world))
        found: dict[str, Any] = {}
        for name, parts in (("whole", (None,)), ("resumed", (2, None))):
            left = iter(losses)

            def measure(model: ShardedModel, left: Any = left) -> Any:
                return SimpleNamespace(loss=next(left), kl=None)

            runner = Runner(world, signals, chosen, measure=measure)
            metrics = []
            for number, stop_after in enumerate(parts):
                start = student if number == 0 else None
                metrics += runner(student_arch, start, output / name, stop_after=stop_after).metrics
            found[name] = {
                "steps": [m.step for m in metrics],
                "losses": [m.valid_loss for m in metrics],
                "checkpoints": sorted(path.name for path in (output / name).iterdir()),
            }
        return found
