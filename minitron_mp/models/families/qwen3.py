"""Qwen 3: Llama with norms of q and k."""

from __future__ import annotations

from minitron_mp.models.families.family import WEIGHTS, Family
from minitron_mp.models.families.readers import ALL_READERS_ANY_SIZE

QWEN3 = Family(
    name="qwen3",
    title="Qwen3",
    transformers_class="Qwen3ForCausalLM",
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    switches={"qk_norm": True},
    weights={
        **WEIGHTS,
        "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
        "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    },
    other_settings=("sliding_window", "max_window_layers"),  # without effect: use_sliding_window is False
    readers=ALL_READERS_ANY_SIZE,
)
