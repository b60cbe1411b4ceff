"""Worker functions for the tests of padded lengths."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch
from cases import Layout
from model_workers import joined, load
from torch import Tensor

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.evaluation import log_likelihood
from minitron_mp.evaluation.log_likelihood import Row, next_tokens, padded_length, row_batches, score_rows
from minitron_mp.models.arch import Arch


def score_padded(layout: Layout, arch: Arch, teacher: Path) -> list[tuple[Tensor, list[int], list[int]]]:
    """Return log-likelihoods, next tokens and batch lengths with CPU padding, and with GPU padding."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 17, 23, 5, 40, 41, 70, 9, 33]
    texts = [torch.randint(0, arch.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    rows = [Row(text, 1 + number % 2) for number, text in enumerate(texts)]
    found = []
    with joined(layout) as world:
        model = load(arch, teacher, world).eval()
        for name in ("cpu", "cuda"):
            device = torch.device(name)

            def padded(
                length: int, parallel: ParallelConfig, _: torch.device, device: torch.device = device
            ) -> int:
                return padded_length(length, parallel, device)

            with patch.object(log_likelihood, "padded_length", padded):
                scores = score_rows(model, rows, micro_batch_size=2, eod=0)
                tokens = next_tokens(model, texts, micro_batch_size=2, eod=0)
                shapes = [group[0]["tokens"].shape[1] for group in row_batches(rows, world, 2, 0)]
            found.append((scores, tokens, shapes))
    return found
