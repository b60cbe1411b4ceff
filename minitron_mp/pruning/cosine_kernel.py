"""A Triton kernel for CUDA: cosine distance of hidden states without a float32 copy of them.

importance.py uses it for the scores of layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 8
"""Eight channels per thread: 16 bytes of bf16 in one load."""


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 - cosine of each pair of rows, float32 [n].

    a, b: [n, h], float32 or bf16, contiguous rows. Each is read once. torch would copy them to
    float32, and read the copies once for each operation.
    """
    assert a.stride(1) == b.stride(1) == 1, "the channels of a row must be contiguous"
    block = min(BLOCK, triton.next_power_of_2(a.shape[1]))
    distances = torch.empty(len(a), dtype=torch.float32, device=a.device)
    _cosine_distance[(len(a),)](
        a, b, distances, a.stride(0), b.stride(0), a.shape[1], BLOCK=block, num_warps=WARPS
    )
    return distances


@triton.jit
def _cosine_distance(a, b, out, stride_a, stride_b, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    a += row * stride_a
    b += row * stride_b
    lane = tl.arange(0, BLOCK)
    product = tl.zeros((BLOCK,), tl.float32)
    square_a = tl.zeros((BLOCK,), tl.float32)
    square_b = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + lane
        x = tl.load(a + column, mask=column < columns, other=0.0).to(tl.float32)
        y = tl.load(b + column, mask=column < columns, other=0.0).to(tl.float32)
        product += x * y
        square_a += x * x
        square_b += y * y
    # Norms are at least 1e-8, as in torch.cosine_similarity.
    norms = tl.sqrt(tl.maximum(tl.sum(square_a, 0), 1e-16)) * tl.sqrt(tl.maximum(tl.sum(square_b, 0), 1e-16))
    tl.store(out + row, 1.0 - tl.sum(product, 0) / norms)
