"""Number formats: bytes per element, and requirements of FP8. This file does not import torch."""

from __future__ import annotations

from typing import NamedTuple

BYTES = {"bf16": 2, "fp32": 4}
"""Precision -> bytes per element."""


class FP8Requirement(NamedTuple):
    """The oldest hardware and software that supports a kind of FP8 scaling.

    capability: compute capability of the GPU. engine: first version of Transformer Engine that
    Megatron-Core 0.16 to 0.19 accept. cuda: CUDA version that torch was built with.
    """

    capability: tuple[int, int]
    engine: str
    cuda: tuple[int, int]


MOMENTS_ENGINE = "2.4"
"""First version of Transformer Engine whose Adam stores bf16 moments (its pull request 1640)."""

FP8_SUPPORT = {
    "delayed": FP8Requirement((8, 9), "2.1", (12, 1)),
    "tensorwise": FP8Requirement((8, 9), "2.2", (12, 1)),
    "blockwise": FP8Requirement((9, 0), "2.3", (12, 9)),
}
"""Kind of FP8 scaling -> its requirements."""
