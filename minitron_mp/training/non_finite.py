"""Find the rank and the parameter that first had a non-finite gradient or loss in a step.

It runs after a step whose update is skipped, so its costs do not matter. It needs no second
backward pass: Megatron reduces gradients in place, so after the reduction a data-parallel rank
still holds its unreduced gradients, except in the piece of the buffer that it owns.

    gradients of a parameter      owned by rank 0        owned by rank 1
    buffer of rank 0              sum of both ranks      gradient of rank 0
    buffer of rank 1              gradient of rank 1     sum of both ranks

A non-finite value in an unreduced piece comes from this rank. If only the sum is not finite, it
comes from the rank that owns it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from minitron_mp.artifacts.checkpoint import model_state
from minitron_mp.artifacts.optimizer_state import local_piece, parameters_of, sharded_by_parameter
from minitron_mp.distributed.process_groups import host_group
from minitron_mp.distributed.world import World
from minitron_mp.models.parameters import EMBEDDING, split_key
from minitron_mp.training.optimizer import TrainableModel

FORWARD_ORDER = (
    "input_layernorm",
    "linear_qkv",
    "q_layernorm",
    "k_layernorm",
    "linear_proj",
    "pre_mlp_layernorm",
    "linear_fc1",
    "linear_fc2",
)
"""Parts of the names inside a layer, in the order of the forward pass."""

LOSSES = ("cross-entropy", "divergence", "loss on hidden states", "loss")
"""Losses of a step in the order in which they are blamed."""

Position = tuple[int, int]
"""Position of a parameter in the forward pass: layer, part of the layer."""


@dataclass(frozen=True)
class _Gradient:
    """A parameter with a non-finite gradient. is_local: the value is from this rank alone."""

    position: Position
    is_local: bool
    name: str


@dataclass(frozen=True)
class _RankReport:
    """What one rank has found. losses: name -> value, of losses that are not finite."""

    coordinates: str
    losses: Mapping[str, float]
    gradients: Sequence[_Gradient] = field(default_factory=list)


def describe(trainable: TrainableModel, losses: Mapping[str, float], world: World) -> str:
    """Return where the step became non-finite, equal on all ranks; reached by all ranks.

    losses: name of LOSSES -> sum over this rank's tokens of the step.
    """
    local = _RankReport(
        world.coordinates,
        {name: value for name, value in losses.items() if not math.isfinite(value)},
        _last_gradients(trainable),
    )
    reports: list[_RankReport | None] = [None] * world.size
    dist.all_gather_object(reports, local, group=host_group())
    found = [report for report in reports if report is not None]
    parts = [part for part in (_loss_text(found), _gradient_text(found)) if part]
    return "; ".join(parts) or "every gradient is finite, but the sum of their squares overflows float32"


def _last_gradients(trainable: TrainableModel) -> list[_Gradient]:
    """Return the last parameter in the forward pass with an unreduced, and with a reduced, such value.

    The backward pass reaches it first.
    """
    names = sharded_by_parameter(
        model_state([chunk.module for chunk in trainable.model.chunks], trainable.model.world)
    )
    found = []
    for shards, parameter in parameters_of(trainable.optimizer):
        gradient = parameter.main_grad.view(-1)  # type: ignore[attr-defined]  # of Megatron's wrapper
        finite = torch.isfinite(gradient)
        if finite.all():
            continue
        owned = local_piece(shards, parameter)
        if owned is not None and shards.data_parallel_group.size() > 1:
            finite[owned] = True
            is_local = not finite.all()
        else:
            is_local = True
        name = names[id(parameter)].key
        found.append(_Gradient(_position(name), is_local, name))
    last = {gradient.is_local: gradient for gradient in sorted(found, key=lambda row: row.position)}
    return list(last.values())


def _position(name: str) -> Position:
    layer, part = split_key(name)
    if layer is None:
        return (-1, 0) if name == EMBEDDING else (10**9, int("output_layer" in name))
    return layer, max((i for i, word in enumerate(FORWARD_ORDER) if word in part), default=-1)


def _gradient_text(reports: Sequence[_RankReport]) -> str:
    found = [
        (gradient.position, gradient.is_local, -rank, gradient.name)
        for rank, report in enumerate(reports)
        for gradient in report.gradients
    ]
    if not found:
        return ""
    _, _, negative_rank, name = max(found)
    return f"first gradient that is not finite: {name} on {reports[-negative_rank].coordinates}"


def _loss_text(reports: Sequence[_RankReport]) -> str:
    """Return the first rank with a non-finite loss; "" if all losses are finite."""
    for name in LOSSES:
        report = next((report for report in reports if name in report.losses), None)
        if report is None:
            continue
        text = f"the {name} of the student is {report.losses[name]} on {report.coordinates}"
        if name in ("divergence", "loss on hidden states"):
            text += ", its cross-entropy is finite, so check the teacher"
        return text
    return ""
