"""Worker functions of test_chat_loss.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import training_workers
from cases import Layout, microbatches
from model_workers import joined, load
from torch import Tensor
from training_workers import Runner

from minitron_mp.config.distillation import DistillConfig
from minitron_mp.distillation.layer_pairs import LayerPairs
from minitron_mp.distillation.teacher import ColocatedTeacher
from minitron_mp.errors import InputError
from minitron_mp.evaluation.quality import compare
from minitron_mp.models.arch import Arch


def train_on_samples(
    layout: Layout,
    arch: Arch,
    teacher: Path,
    student_arch: Arch,
    student: Path,
    output: Path,
    chosen: DistillConfig,
    samples: list[dict[str, Tensor]],
    channels: list[int] | None = None,
) -> dict[str, Any]:
    """Train with the given samples of each step, and evaluate the first student on those of each step."""
    with joined(layout) as world:
        pairs = None
        if chosen.states is not None:
            pairs = LayerPairs(chosen.states, student_arch, arch, tuple(channels or ()))
        signals = ColocatedTeacher(load(arch, teacher, world), pairs=pairs)
        with patch.object(training_workers, "make_samples", lambda arch, step, count: samples[step]):
            trained = Runner(world, signals, chosen)(student_arch, student, output)
        found = {
            "metrics": trained.metrics,
            "finite": all(bool(weight.isfinite().all()) for weight in trained.weights),
        }
        if pairs is not None:
            return found
        models = {"student": load(student_arch, student, world)}
        dp = world.groups.dp
        groups = [[microbatches(each, 1, dp.rank(), dp.size())] for each in samples]
        found["quality"] = compare(models, signals, groups[0])["student"]
        try:
            compare(models, signals, groups[-1])
        except InputError as error:
            found["error"] = str(error)
        return found
