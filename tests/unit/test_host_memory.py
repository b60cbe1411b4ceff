"""Host memory for a remote teacher's signals for the held-out text."""

from __future__ import annotations

import math
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from cases import ARCHS

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import make_recipe
from minitron_mp.distillation.stream_layout import StreamShape
from minitron_mp.models.sharded_model import DTYPES
from minitron_mp.planning.memory import held_out_signal_bytes
from minitron_mp.workflow.host_memory import host_memory_problems

ARCH = next(iter(ARCHS.values()))
DISTILL = {"steps": 100, "global_batch_size": 8, "valid_interval": 50, "valid_batches": 3}


def recipe(payload: str = "hidden", distill: dict[str, object] | None = None, **parallel: object):
    teacher = {"placement": "remote", "payload": payload, **({"top_k": 4} if payload == "topk" else {})}
    values = {"model": "m", "output": "o", "parallel": parallel, "teacher": teacher}
    return make_recipe({**values, "data": {"sequence_length": 32}, "distill": distill or DISTILL})


@pytest.mark.parametrize(
    "parallel", [{}, {"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"cp": 2, "pp": 2}, {"tp": 2, "cp": 2}]
)
@pytest.mark.parametrize("payload", ["hidden", "logits", "topk"])
def test_bytes_are_those_of_the_received_tensors(payload, parallel):
    """Two replicas of the student share the microbatches."""
    chosen = recipe(payload, **parallel)
    width = {"hidden": ARCH.hidden_size, "logits": ARCH.padded_vocab_size, "topk": 9}[payload]
    shape = StreamShape(payload, 32, 1, width, DTYPES["bf16"])
    element = 4 if payload == "topk" else 2
    layout = ParallelConfig(**parallel)
    expected = 3 * 8 / 2 * math.prod(shape.local(layout)) * element
    assert held_out_signal_bytes(ARCH, chosen, 2 * layout.model_ranks) == expected


def test_run_needs_the_memory_on_a_node():
    """All four ranks of the last stage are on one node."""
    chosen = recipe(pp=2)
    needed = held_out_signal_bytes(ARCH, chosen, 8) * 4
    with patch("minitron_mp.distributed.launcher.ranks_per_node", lambda: 8):
        for free, fits in ((needed, True), (needed - 1, False)):
            with patch("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free)):
                problems = host_memory_problems(chosen, ARCH, 8)
            assert (problems == []) == fits
    assert "distill.valid_batches 3 x global_batch_size 8: the teacher's signals" in problems[0]
    assert held_out_signal_bytes(ARCH, recipe(distill={"steps": 100}), 8) == 0
