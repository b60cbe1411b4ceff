"""Megatron-Core's layer specification: the class of each module of a layer."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from minitron_mp.models.arch import Arch
from minitron_mp.models.layers import Attention, LayerNorm1p, RMSNorm


def block_spec(
    config: TransformerConfig, arch: Arch, vp_stage: int | None, pp_rank: int, engine: bool
) -> TransformerBlockSubmodules:
    """Return the layer specifications of one pipeline chunk.

    Norms are separate modules for local and Transformer Engine layers. (Megatron's Transformer
    Engine spec fuses each norm into the next linear layer.) So checkpoint keys, hooks and masks are
    the same for both. The cost is one more write and one more read of each norm's output, 2 s b h
    bytes each in bf16: under a hundredth of a layer's time at hidden size 4096 on an H100
    (computed, not measured). engine_layers.py has the other reasons.
    """
    layer, norm = _engine_layer(arch) if engine else _local_layer(arch)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    if arch.qk_norm:
        attention = parts.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = norm
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _local_layer(arch: Arch) -> tuple[ModuleSpec, type]:
    """Return Megatron's local layer with attention and norms for any device, and the norm class.

    Attention and norms support sequence and context parallelism.
    """
    layer = get_gpt_layer_local_spec(qk_layernorm=arch.qk_norm, normalization="RMSNorm")
    layer.submodules.self_attention.submodules.core_attention = Attention
    return layer, RMSNorm if arch.norm == "rms" else LayerNorm1p


def _engine_layer(arch: Arch) -> tuple[ModuleSpec, type]:
    """Return Megatron's layer with Transformer Engine's modules, and the norm class."""
    from minitron_mp.models.engine_layers import EngineLayerNorm1p, EngineRMSNorm, UnfusedNormProvider

    engine = UnfusedNormProvider()
    layer = get_gpt_layer_local_spec(qk_layernorm=arch.qk_norm, normalization="RMSNorm")
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = engine.core_attention()
    attention.linear_qkv = engine.column_parallel_linear()
    attention.linear_proj = engine.row_parallel_linear()
    layer.submodules.mlp = get_mlp_module_spec_for_backend(backend=engine)
    return layer, EngineRMSNorm if arch.norm == "rms" else EngineLayerNorm1p
