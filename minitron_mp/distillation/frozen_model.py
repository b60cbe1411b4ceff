"""Models for forward passes only: a teacher that is loaded from a checkpoint, or its output layer alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_mp.artifacts.checkpoint import load_checkpoint, load_model, vocabulary_shard
from minitron_mp.distributed.world import World
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import build_model
from minitron_mp.models.sharded_model import ShardedModel


@dataclass(frozen=True)
class ModelCheckpoint:
    """A model in a checkpoint folder. prefix: of its keys, where the folder also holds another model."""

    arch: Arch
    folder: Path
    prefix: str = ""


def frozen_model(
    checkpoint: ModelCheckpoint,
    world: World,
    *,
    precision: str,
    sequence_length: int,
    transformer_impl: str = "auto",
    fp8: str | None = None,
) -> ShardedModel:
    """Build and load a model for forward passes only; called by all ranks. Options as in build_model()."""
    with torch.no_grad():  # otherwise FP8 weights would get a transposed copy for the backward pass
        chunks = build_model(
            checkpoint.arch,
            world,
            precision=precision,
            sequence_length=sequence_length,
            transformer_impl=transformer_impl,
            fp8=fp8,
        )
    load_model(chunks, checkpoint.folder, world, checkpoint.prefix)
    freeze(chunks)
    return ShardedModel(chunks, checkpoint.arch, world, sequence_length, precision)


def freeze(chunks: list[Any]) -> None:
    """Switch model chunks to evaluation mode, without gradients."""
    for chunk in chunks:
        chunk.eval().requires_grad_(False)


def load_head(arch: Arch, folder: Path, world: World, dtype: torch.dtype) -> Tensor | None:
    """Load a teacher's output layer in the student's tensor-parallel layout; called by all ranks.

    [v/tp, h_t] on the last stage, None elsewhere.
    """
    state = {}
    if world.is_last_stage:
        rows = arch.padded_vocab_size // world.groups.tp.size()
        empty = torch.empty((rows, arch.hidden_size), dtype=dtype)
        state["head"] = vocabulary_shard(arch, empty, world)
    loaded = load_checkpoint(state, folder)
    return loaded["head"].to(world.device) if world.is_last_stage else None
