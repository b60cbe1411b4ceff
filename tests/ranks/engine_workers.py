"""Worker functions for the tests of Transformer Engine's layers without a GPU, with its double."""

from __future__ import annotations

import engine_double  # isort: skip  (before megatron.core)

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cases import SEQUENCE_LENGTH, Layout, make_samples, microbatches
from model_workers import joined, manifest
from torch import Tensor

from minitron_mp.artifacts.checkpoint import load_weights, model_state, save_checkpoint
from minitron_mp.config.pruning import ScoreConfig
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.distributed.world import World
from minitron_mp.models import build
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.pruning.importance import score
from minitron_mp.training.loop import train_one
from minitron_mp.training.options import RunOptions

STEPS = 3


def load(arch: Arch, folder: Path, world: World, *, engine: bool, **options: Any) -> ShardedModel:
    """Build a model with or without Transformer Engine's layers, and load a checkpoint."""
    options = {"sequence_length": SEQUENCE_LENGTH, **options}
    with patch.object(build, "uses_engine", lambda *_: engine), patch.object(build, "check_hardware"):
        model = build_model(arch, world, ModelOptions(**options))
    load_weights(model.chunks, folder, world)
    return model


def write_teacher(arch: Arch, folder: Path, *, engine: bool) -> list[str]:
    """Write a random checkpoint with one kind of layers, and return its keys."""
    with joined(Layout("one", 1)) as world:
        torch.manual_seed(3)
        with patch.object(build, "uses_engine", lambda *_: engine):
            options = ModelOptions(precision="fp32", sequence_length=SEQUENCE_LENGTH, random_weights=True)
            model = build_model(arch, world, options)
        with torch.no_grad():
            for name, parameter in model.last_chunk.named_parameters():
                if "norm" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        state = model_state(model.chunks, world)
        save_checkpoint(state, folder, manifest("teacher", arch))
        return sorted(state["model0"])


def run_model(
    layout: Layout, arch: Arch, teacher: Path, *, engine: bool, precision: str, output: Path, **training: Any
) -> dict[str, Any]:
    """Run forward passes, scoring and a few steps of training.

    Returns hidden states, scores, losses, trained weights, and the calls of the double.
    """
    found: dict[str, Any] = {}
    engine_double.calls.clear()
    engine_double.settings.clear()
    with joined(layout) as world:
        model = load(arch, teacher, world, engine=engine, precision=precision).eval()
        batches = microbatches(make_samples(arch, 0, 4), 2, world.groups.dp.rank(), world.groups.dp.size())
        hidden = model.forward(batches, lambda hidden, _: hidden.float())
        found["hidden"] = torch.cat(hidden, 1) if hidden else None
        scores = score(model, [batches], ScoreConfig()).tensors()
        found["scores"] = {name: torch.as_tensor(value) for name, value in scores.items()}
        settings = CorrectionConfig(
            steps=STEPS, warmup_steps=0, global_batch_size=4, micro_batch_size=2, lr=1e-2, **training
        )
        model = load(arch, teacher, world, engine=engine, precision=precision, training=settings)
        losses: list[float] = []
        options = RunOptions(
            output, manifest("correct"), seed=3, on_step=lambda metrics: losses.append(metrics.loss)
        )
        train_one(model, None, lambda step: batches, settings, options)
        found["losses"] = losses
        found["weights"] = {
            f"{number}.{name}": value.detach().float().clone()
            for number, chunk in enumerate(model.chunks)
            for name, value in chunk.named_parameters()
        }
    found["calls"] = dict(engine_double.calls)
    found["settings"] = dict(engine_double.settings)
    return found


def hidden_of(layout: Layout, arch: Arch, teacher: Path, *, engine: bool) -> Tensor:
    """Return the hidden states after the final norm, for one rank."""
    with joined(layout) as world:
        model = load(arch, teacher, world, engine=engine, precision="fp32").eval()
        batches = microbatches(make_samples(arch, 0, 4), 2, 0, 1)
        return torch.cat(model.forward(batches, lambda hidden, _: hidden), 1)


def run_fp8(
    layout: Layout, arch: Arch, teacher: Path, kind: str, output: Path, tokens: int
) -> dict[str, Any]:
    """Run a step of training with FP8, then a forward pass of a model with FP8 weights.

    Returns the calls of the double in each.
    """
    samples = torch.arange(2 * tokens).view(2, tokens) % arch.vocab_size
    batch = {
        "tokens": samples,
        "labels": samples,
        "position_ids": torch.arange(tokens).expand(2, tokens).contiguous(),
        "loss_mask": torch.ones(2, tokens),
    }
    settings = CorrectionConfig(
        steps=1, warmup_steps=0, global_batch_size=2, micro_batch_size=2, lr=1e-3, fp8=kind
    )
    found = {}
    options: dict[str, Any] = {"engine": True, "precision": "bf16", "sequence_length": tokens}
    with joined(layout) as world:
        engine_double.calls.clear()
        model = load(arch, teacher, world, training=settings, **options)
        train_one(
            model, None, lambda step: [batch], settings, RunOptions(output, manifest("correct"), seed=3)
        )
        found["training"] = dict(engine_double.calls)
        engine_double.calls.clear()
        model = load(arch, teacher, world, fp8=kind, **options).freeze()
        model.forward([batch])
        found["frozen"] = dict(engine_double.calls)
    return found
