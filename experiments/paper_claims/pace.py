"""Time of a distillation step: this library's train() and the plain transformers loop.

Both alternate step by step in one process, because the speed of a shared machine changes with time.
Student weights and tokens are random, which does not change the time.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from baseline import PlainLoop

from minitron_mp import Recipe
from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.artifacts.saved_model import load_model
from minitron_mp.distillation.teacher import ColocatedTeacher
from minitron_mp.distributed.world import join_world
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.models.hf_config import read_arch
from minitron_mp.models.sharded_model import DTYPES
from minitron_mp.training.loop import train_one
from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.options import RunOptions

WARM_UP = 2
"""Steps of each loop before the measured ones."""


def in_turn(recipe: Recipe, student: dict[str, Any], teacher: Path, *, pairs: int) -> dict[str, Any]:
    """Return tokens/s of both loops from median steps, and our speed-up in each pair of steps.

    recipe: gives the plain loop's teacher (model), precision, sequence length and `distill`.
    student: contents of its config.json. teacher: output of the stage `import`. Runs in one process
    on one device.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = recipe.distill.model_copy(
        update={"steps": pairs + WARM_UP, "warmup_steps": 1, "log_interval": 1, "checkpoint_interval": 10**6}
    )
    size = settings.micro_batch_size, recipe.data.sequence_length
    times: dict[str, list[float]] = {"minitron_mp": [], "transformers": []}
    with join_world(recipe.parallel, seed=recipe.seed) as w, tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(student))
        arch, length = read_arch(Path(scratch), weights=False), recipe.data.sequence_length
        model = build_model(
            arch,
            w,
            ModelOptions(
                training=settings,
                random_weights=True,
                precision=recipe.precision,
                sequence_length=length,
            ),
        )
        ours = ColocatedTeacher(
            load_model(teacher, w, sequence_length=length, precision=recipe.teacher_precision)
        )
        loop = PlainLoop(
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**student), dtype=torch.float32).to(
                w.device
            ),
            AutoModelForCausalLM.from_pretrained(recipe.model, dtype=DTYPES[recipe.teacher_precision]).to(
                w.device
            ),
            settings,
            recipe.precision,
        )

        def batches_of(step: int) -> list[dict[str, torch.Tensor]]:
            generator = torch.Generator().manual_seed(step)
            count = settings.global_batch_size // settings.micro_batch_size
            return [random_batch(ours.model.arch.vocab_size, size, generator) for _ in range(count)]

        def on_step(metrics: StepMetrics) -> None:
            step = metrics.step - 1
            samples, start = batches_of(step), time.perf_counter()
            loop.step(step, samples)  # it returns numbers, so it waits for the device
            times["transformers"].append(time.perf_counter() - start)
            times["minitron_mp"].append(metrics.step_time_s)

        options = RunOptions(
            Path(scratch) / "checkpoints",
            Manifest(stage="distill", settings={}, inputs={}),
            seed=recipe.seed,
            on_step=on_step,
        )
        train_one(model, ours, batches_of, settings, options)
    measured = {name: seconds[WARM_UP:] for name, seconds in times.items()}
    tokens = settings.global_batch_size * recipe.data.sequence_length
    speeds = {name: tokens / statistics.median(seconds) for name, seconds in measured.items()}
    return {
        "tokens_per_s": speeds,
        "ratios": [b / a for a, b in zip(measured["minitron_mp"], measured["transformers"])],
    }


def random_batch(
    vocab_size: int, size: tuple[int, int], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, vocab_size, (size[0], size[1] + 1), generator=generator)
    positions = torch.arange(size[1])[None].expand(size).contiguous()
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": positions,
        "loss_mask": torch.ones(size),
    }


def format_ratios(ratios: list[float]) -> str:
    """Return median, smallest and largest ratio as text."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
