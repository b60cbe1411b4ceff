"""Tile sizes of the distillation loss.

This file does not import torch, so that the memory planner can use it.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class TileRows(NamedTuple):
    """Rows that the loss handles at once. Each number is at most the next one.

    softmax: rows of the row functions, which compute softmax sums, divergences and their gradients.
    logits_gemm: rows of the matrix product that computes logits. The tiles of student and teacher
        are in memory at the same time.
    weight_gradient_gemm: rows of gradients of the logits that one product multiplies with the hidden
        states.
    """

    softmax: int
    logits_gemm: int
    weight_gradient_gemm: int


class TileSizes(NamedTuple):
    """Numbers of logits (rows x columns of one rank) for each kind of tile, and rules for the rows.

    row_multiple: rows of every tile but the last. weight_gradient_rows: rows of a product of the
    weight gradient, also when they have more logits than weight_gradient_gemm, up to most_logits.
    """

    softmax: int
    logits_gemm: int
    weight_gradient_gemm: int
    row_multiple: int = 1
    weight_gradient_rows: int = 1
    most_logits: int = 1 << 62

    def rows(self, num_rows: int, columns: int) -> TileRows:
        """Return the rows of each tile for num_rows rows of a rank with this number of columns."""
        parts = max(1, self.logits_gemm // columns)
        wanted = max(self.weight_gradient_gemm // columns, self.weight_gradient_rows)
        wanted = max(parts, min(wanted, self.most_logits // columns))
        # Equal products: a short last one would read and write the weight gradient for few rows.
        block = self._divided(num_rows, wanted)
        part = min(block, self._divided(block, parts - parts % self.row_multiple or parts))
        return TileRows(min(part, max(1, self.softmax // columns)), part, block)

    def _divided(self, num_rows: int, limit: int) -> int:
        """Return the rows of the fewest equal tiles of at most `limit` rows."""
        equal = math.ceil(num_rows / math.ceil(num_rows / limit))
        return math.ceil(equal / self.row_multiple) * self.row_multiple


TILE_SIZES = {
    "cpu": TileSizes(softmax=1 << 20, logits_gemm=1 << 26, weight_gradient_gemm=1 << 26),
    "cuda": TileSizes(
        softmax=1 << 26,
        logits_gemm=1 << 26,
        weight_gradient_gemm=1 << 28,
        row_multiple=128,
        weight_gradient_rows=4096,
        most_logits=1 << 30,
    ),
}
"""Device type -> tile sizes.

CPU: softmax tiles fit into the cache. The size of the products hardly matters.

GPU: a small logits tile limits the float32 logits in memory. Hopper's matrix products work on 128
rows at a time, so 523 rows cost as much as 640. A product of the weight gradient reads and writes the
float32 gradient of the complete weight, which 4096 rows outweigh four times (720 TFLOP/s, 3 TB/s).
"""
