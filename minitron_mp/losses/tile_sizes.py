"""Tile sizes of the distillation loss. Imports no torch, so the memory planner can read them."""

from __future__ import annotations

from typing import NamedTuple


class TileSizes(NamedTuple):
    """How many logits (rows x columns of one rank) the loss handles at once.

    softmax: tile of the row functions, which compute softmax sums, divergences and their gradients.
    logits_gemm: tile of the matrix product that computes logits; the student's and the teacher's
        are alive.
    weight_gradient_gemm: gradients of the logits that are collected for the product with the hidden
        states.
    """

    softmax: int
    logits_gemm: int
    weight_gradient_gemm: int


TILE_SIZES = {
    "cpu": TileSizes(softmax=1 << 20, logits_gemm=1 << 26, weight_gradient_gemm=1 << 26),
    "cuda": TileSizes(softmax=1 << 26, logits_gemm=1 << 26, weight_gradient_gemm=1 << 28),
}
"""By device type.

CPU: softmax tiles fit into the cache, and the products may be as large as they like. GPU: few
float32 logits are alive, but four logits tiles share one weight-gradient product, which over few
rows is bound by the memory traffic of the weight gradient.
"""
