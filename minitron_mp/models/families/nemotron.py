"""Nemotron: layer norms with a bias, squared ReLU without a gate, partly rotated heads."""

from __future__ import annotations

from minitron_mp.models.arch import Arch
from minitron_mp.models.families.family import CONFIG_FIELDS, REQUIRED_SETTINGS, WEIGHTS, Family
from minitron_mp.models.families.readers import (
    ALL_READERS_ANY_SIZE,
    hidden_is_heads_times_head_dim,
    not_supported,
)
from minitron_mp.models.parameters import FINAL_NORM_BIAS


def _llama_cpp(arch: Arch) -> str:
    """llama.cpp computes head_dim from hidden_size, and requires an output layer."""
    if arch.tied:
        return "it needs a separate output layer, and in this model the embedding is the output layer"
    return hidden_is_heads_times_head_dim(arch)


NEMOTRON = Family(
    name="nemotron",
    title="Nemotron",
    transformers_class="NemotronForCausalLM",
    defaults={
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "hidden_act": "relu2",
    },
    switches={"norm": "layer1p", "activation": "squared_relu"},
    config_fields={**CONFIG_FIELDS, "norm_epsilon": "norm_eps"},
    weights={
        **WEIGHTS,
        "self_attention.linear_qkv.layer_norm_bias": ("input_layernorm.bias",),
        "mlp.linear_fc1.layer_norm_bias": ("post_attention_layernorm.bias",),
        "mlp.linear_fc1.weight": ("mlp.up_proj.weight",),
        FINAL_NORM_BIAS: ("model.norm.bias",),
    },
    required_settings={**REQUIRED_SETTINGS, "hidden_act": "relu2"},
    required_rope={},
    rope_aliases=("rope_percent", "rope_percentage"),
    readers={**ALL_READERS_ANY_SIZE, "llama.cpp": _llama_cpp, "CTranslate2": not_supported},
)
