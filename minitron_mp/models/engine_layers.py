"""Transformer Engine's modules, imported only where they run: the import needs a GPU build."""

from __future__ import annotations

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider


class UnfusedNormProvider(TESpecProvider):
    """Transformer Engine's modules, with each norm beside its linear layer instead of inside."""

    def fuse_layernorm_and_linear(self) -> bool:
        return False
