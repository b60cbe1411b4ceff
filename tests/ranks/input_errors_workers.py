"""Worker functions for the tests of input errors: each returns the InputError's message, or ""."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import (
    DEFAULT_PAIR,
    DISTILL,
    SEQUENCE_LENGTH,
    Layout,
    make_samples,
    microbatches,
    settings,
    targets,
)
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from model_workers import joined, load, score_samples
from training_workers import Runner

from minitron_mp.distillation.teacher import ColocatedTeacher
from minitron_mp.distributed.sync import raise_on_all_ranks
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.pruning.make_plan import make_plan
from minitron_mp.pruning.slicing import prune, slice_tensor


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except InputError as error:
        return str(error)
    return ""


def model(layout: Layout, arch: Arch) -> str:
    def build() -> None:
        with joined(layout) as world:
            build_model(arch, world, ModelOptions(precision="fp32", sequence_length=SEQUENCE_LENGTH))

    return refusal(build)


def scores(layout: Layout, arch: Arch, teacher: Path, key: str, layer: int) -> str:
    """One weight of one layer is NaN."""
    with joined(layout) as world, torch.no_grad():
        model = load(arch, teacher, world)
        for block in (block for chunk in model.chunks for block in chunk.decoder.layers):
            if block.layer_number - 1 == layer:
                dict(block.named_parameters())[key][0, 0] = torch.nan
        return refusal(lambda: score_samples(model, make_samples(arch, 0, 4), DEFAULT_PAIR))


def checkpoint(layout: Layout, arch: Arch, folder: Path) -> str:
    with joined(layout) as world:
        return refusal(lambda: load(arch, folder, world))


def too_few_microbatches(layout: Layout, arch: Arch, teacher: Path) -> str:
    with joined(layout) as world:
        model = load(arch, teacher, world)
        return refusal(lambda: model.forward(microbatches(make_samples(arch, 0, 3), 1, 0, 1)))


def parameter(layout: Layout, arch: Arch, teacher: Path) -> str:
    with joined(layout) as world:
        model = load(arch, teacher, world)
        plan = make_plan(
            score_samples(model, make_samples(arch, 0, 4), DEFAULT_PAIR),
            arch,
            targets(arch)["all"],
        )
        tensor = ShardedTensor.from_rank_offsets("decoder.layers.0.mlp.unheard_of.weight", torch.ones(2))
        return refusal(lambda: slice_tensor(tensor, plan, world))


def wrapped(layout: Layout, arch: Arch, teacher: Path) -> str:
    with joined(layout) as world:
        model = load(arch, teacher, world)
        (chunk,) = model.chunks
        plan = make_plan(
            score_samples(model, make_samples(arch, 0, 4), DEFAULT_PAIR),
            arch,
            targets(arch)["all"],
        )
        wrapped = DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)
        return refusal(lambda: prune(model.with_chunks([wrapped]), plan))


def resume(layout: Layout, arch: Arch, teacher: Path, checkpoints: Path) -> str:
    with joined(layout) as world:
        first = Runner(world, None, DISTILL.model_copy(update={"kl_weight": 0.0}), lr_in_manifest=1)
        first(arch, teacher, checkpoints, stop_after=1)
        second = Runner(world, None, first.settings, lr_in_manifest=2)
        return refusal(lambda: second(arch, teacher, checkpoints))


def loss(layout: Layout, arch: Arch, teacher: Path, checkpoints: Path) -> str:
    """The teacher's final norm is NaN, so its logits are, on the last stage only."""
    with joined(layout) as world:
        signals = ColocatedTeacher(load(arch, teacher, world))
        if world.is_last_stage:
            signals.model.last_chunk.decoder.final_layernorm.weight.fill_(torch.nan)
        chosen = settings(layout).model_copy(update={"max_skipped": 0})
        return refusal(lambda: Runner(world, signals, chosen)(arch, teacher, checkpoints))


def by_one(layout: Layout) -> str:
    with joined(layout) as world:
        return refusal(
            lambda: raise_on_all_ranks(InputError("the disk is full") if world.rank == 1 else None)
        )
