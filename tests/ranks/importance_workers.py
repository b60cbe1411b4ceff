"""Workers of test_importance.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from cases import DEFAULT_PAIR, Layout, make_samples
from model_workers import joined, load, score_samples
from torch.distributed import ReduceOp

from minitron_mp.models.arch import Arch
from minitron_mp.models.axes import AXES, FFN
from minitron_mp.pruning import importance
from minitron_mp.pruning.aggregation import SEQUENCE_AGGREGATIONS, SequenceAggregation

TWIN = dataclasses.replace(FFN, name="twin", dims={})
MAXIMUM = SequenceAggregation(
    partial=lambda a: torch.linalg.vector_norm(a, torch.inf, dim=0, dtype=torch.float32)[None],
    finish=lambda maxima, tokens: maxima[0],
    reduce_op=ReduceOp.MAX,
)


def score_with_a_new_axis(layout: Layout, arch: Arch, teacher: Path) -> dict[str, np.ndarray]:
    """Return the scores when the table of axes has one more row, whose probes are those of ffn."""
    with (
        mock.patch.dict(AXES, {TWIN.name: TWIN}),
        mock.patch.object(importance, "IN_ORDER", [*importance.IN_ORDER, TWIN]),  # made at import
        joined(layout) as world,
    ):
        return score_samples(load(arch, teacher, world), make_samples(arch, 0, 8), DEFAULT_PAIR).tensors()


def score_by_maximum(layout: Layout, arch: Arch, teacher: Path) -> dict[str, np.ndarray]:
    """Return the scores when the row "mean" of the table takes the maximum over the sequence."""
    with mock.patch.dict(SEQUENCE_AGGREGATIONS, {"mean": MAXIMUM}), joined(layout) as world:
        return score_samples(load(arch, teacher, world), make_samples(arch, 0, 8), DEFAULT_PAIR).tensors()
