"""Transformer Engine's modules. The import of this file needs a GPU build of Transformer Engine."""

from __future__ import annotations

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider


class UnfusedNormProvider(TESpecProvider):
    """Transformer Engine's modules, with norms as separate modules instead of fused norms."""

    def fuse_layernorm_and_linear(self) -> bool:
        return False
