"""Worker functions of test_document_mask.py."""

from __future__ import annotations

from pathlib import Path

from cases import Layout, microbatches
from model_workers import global_logits, joined, load
from torch import Tensor

from minitron_mp.models.arch import Arch
from minitron_mp.pruning.ablation import losses_without


def outputs(
    layout: Layout, arch: Arch, teacher: Path, samples: dict[str, Tensor]
) -> tuple[Tensor | None, float]:
    """Return the logits of global_logits(), and the loss of the walk over the layers."""
    with joined(layout) as world:
        model = load(arch, teacher, world).eval()
        groups = [microbatches(samples, 1, world.groups.dp.rank(), world.groups.dp.size())]
        loss, _ = losses_without(model, groups, [frozenset({1})])
        return global_logits(model, samples), loss
