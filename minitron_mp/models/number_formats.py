"""Number formats: bytes per element, and what FP8 needs. Imports no torch."""

from __future__ import annotations

BYTES = {"bf16": 2, "fp32": 4}
"""Precision -> bytes per element."""

FP8_SUPPORT = {
    "delayed": ((8, 9), "2.1", (12, 1)),
    "tensorwise": ((8, 9), "2.2", (12, 1)),
    "blockwise": ((9, 0), "2.3", (12, 9)),
}
"""Kind -> least compute capability, Transformer Engine (the first that Megatron-Core 0.16 to 0.19 take for it) and CUDA of torch that have it."""
