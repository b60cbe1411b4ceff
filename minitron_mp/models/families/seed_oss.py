"""Seed-OSS: Llama with biases of q, k and v."""

from __future__ import annotations

from minitron_mp.models.families.family import REQUIRED_SETTINGS, WEIGHTS, Family
from minitron_mp.models.families.readers import any_size

SEED_OSS = Family(
    name="seed_oss",
    title="Seed-OSS",
    transformers_class="SeedOssForCausalLM",
    defaults={"max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128},
    switches={"qkv_bias": True},
    weights={
        **WEIGHTS,
        "self_attention.linear_qkv.bias": (
            "self_attn.q_proj.bias",
            "self_attn.k_proj.bias",
            "self_attn.v_proj.bias",
        ),
    },
    required_settings={**REQUIRED_SETTINGS, "attention_bias": True, "attention_out_bias": False},
    readers={"transformers 5": any_size},
)
