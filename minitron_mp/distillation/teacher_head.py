"""load_head: the teacher's output layer, for a student whose teacher sends hidden states."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from minitron_mp.artifacts.checkpoint import load_checkpoint, vocabulary_shard
from minitron_mp.distributed.world import World
from minitron_mp.models.arch import Arch


def load_head(arch: Arch, folder: Path, world: World, dtype: torch.dtype) -> Tensor | None:
    """Return the weight of a teacher's output layer in the student's tensor-parallel layout.

    It is [v/tp, h_t] on the last stage and None on other stages. Reached by all ranks.
    """
    state = {}
    if world.is_last_stage:
        rows = arch.padded_vocab_size // world.groups.tp.size()
        empty = torch.empty((rows, arch.hidden_size), dtype=dtype)
        state["head"] = vocabulary_shard(arch, empty, world)
    loaded = load_checkpoint(state, folder)
    return loaded["head"].to(world.device) if world.is_last_stage else None
