"""Tile sizes of the distillation loss.

This file does not import torch, so that the memory planner can use it.
"""

from __future__ import annotations

from typing import NamedTuple


class TileSizes(NamedTuple):
    """Numbers of logits (rows x columns of one rank) that the loss handles at once.

    softmax: tile of the row functions, which compute softmax sums, divergences and their gradients.
    logits_gemm: tile of the matrix product that computes logits. The tiles of student and teacher
        are in memory at the same time.
    weight_gradient_gemm: tile of the gradients of the logits that one product multiplies with the
        hidden states.
    """

    softmax: int
    logits_gemm: int
    weight_gradient_gemm: int


TILE_SIZES = {
    "cpu": TileSizes(softmax=1 << 20, logits_gemm=1 << 26, weight_gradient_gemm=1 << 26),
    "cuda": TileSizes(softmax=1 << 26, logits_gemm=1 << 26, weight_gradient_gemm=1 << 28),
}
"""Device type -> tile sizes.

CPU: softmax tiles fit into the cache. The size of the products hardly matters. GPU: a small logits
tile limits the float32 logits in memory. Four logits tiles share one weight-gradient product,
because a product over few rows is bound by the memory traffic of the weight gradient.
"""
