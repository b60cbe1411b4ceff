"""Qwen 2 and 2.5: Llama with biases of q, k and v."""

from __future__ import annotations

from minitron_mp.models.families.family import WEIGHTS, Family
from minitron_mp.models.families.readers import ALL_READERS_ANY_SIZE, hidden_is_heads_times_head_dim

QWEN2 = Family(
    name="qwen2",
    title="Qwen2",
    transformers_class="Qwen2ForCausalLM",
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
    switches={"qkv_bias": True},
    weights={
        **WEIGHTS,
        "self_attention.linear_qkv.bias": (
            "self_attn.q_proj.bias",
            "self_attn.k_proj.bias",
            "self_attn.v_proj.bias",
        ),
    },
    other_settings=("sliding_window", "max_window_layers"),  # without effect: use_sliding_window is False
    readers={
        **ALL_READERS_ANY_SIZE,
        "vLLM": hidden_is_heads_times_head_dim,
        "llama.cpp": hidden_is_heads_times_head_dim,
        "CTranslate2": hidden_is_heads_times_head_dim,
    },
)
