"""Lengths that rows of tokens are padded to on a GPU: few of them, and the same numbers."""

from __future__ import annotations

import random

import pytest
import torch
from cases import ARCHS, BY_NAME

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.evaluation.log_likelihood import padded_length

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SP = ParallelConfig(tp=8, sequence_parallel=True)
ROUNDING = 1e-5
"""float32 sums over rows of another length; 2e-6 seen."""


@pytest.mark.parametrize("layout", ["one", "tp2-sp"])
def test_padding_does_not_change_the_scores(results, ranks, layout):
    case = BY_NAME[layout]
    by_rank = ranks(
        case.ranks,
        "padding_workers.score_padded",
        layout=case,
        arch=ARCHS["qwen3"],
        teacher=results.teacher("qwen3"),
    )
    for (scores, tokens, lengths), (gpu_scores, gpu_tokens, gpu_lengths) in by_rank:
        assert torch.allclose(gpu_scores[:, 0], scores[:, 0], rtol=ROUNDING, atol=ROUNDING)
        assert torch.equal(gpu_scores[:, 1], scores[:, 1])
        assert gpu_tokens == tokens
        assert len(set(lengths)) > len(set(gpu_lengths))
        assert set(gpu_lengths) <= {64, 128}


def test_lengths_on_a_gpu():
    lengths = [padded_length(n, ParallelConfig(), GPU) for n in range(1, 8193)]
    assert len(set(lengths)) == 24
    assert all(padded >= n for n, padded in enumerate(lengths, 1))
    assert max(padded / n for n, padded in enumerate(lengths, 1) if n > 256) < 1.25
    assert [padded_length(n, ParallelConfig(), GPU) for n in (1, 64, 65, 512, 513, 4096)] == [
        64,
        64,
        128,
        512,
        640,
        4096,
    ]
    assert [padded_length(n, ParallelConfig(), CPU) for n in (1, 64, 65)] == [1, 64, 65]


@pytest.mark.parametrize("parallel", [SP, ParallelConfig(cp=2), ParallelConfig(tp=3, sequence_parallel=True)])
def test_lengths_fit_the_layout(parallel):
    for n in range(1, 2000, 7):
        assert padded_length(n, parallel, CPU) % parallel.sequence_multiple == 0
        padded = padded_length(n, parallel, GPU)
        assert padded % parallel.sequence_multiple == 0
        assert parallel.tokens_of_sample(padded) % 8 == 0, "FP8 products need 8 rows on each rank"


def test_a_task_set_has_few_lengths():
    """Lengths like those of choice tasks (40 to 200 tokens), five-shot tasks and generation."""
    chance = random.Random(0)
    groups = [round(chance.lognormvariate(4.5, 0.6)) + 8 for _ in range(400)]
    groups += [round(chance.gauss(900, 250)) for _ in range(200)]
    groups += list(range(700, 956))  # one more token in each pass of a generation
    groups = [max(1, n) for n in groups]
    assert len({padded_length(n, ParallelConfig(), CPU) for n in groups}) > 400
    assert len({padded_length(n, ParallelConfig(), GPU) for n in groups}) <= 16
