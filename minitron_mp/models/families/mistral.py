"""Mistral: Llama with a sliding window. The window must cover all positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_mp.models.families.family import Family
from minitron_mp.models.families.readers import ALL_READERS_ANY_SIZE


def _window_problems(config: Mapping[str, Any]) -> list[str]:
    window, positions = config.get("sliding_window"), config["max_position_embeddings"]
    if not window or not positions or window >= positions:
        return []
    return [
        f"sliding_window is {window}, below max_position_embeddings {positions}; "
        "set it to null if no sequence is longer than the window"
    ]


MISTRAL = Family(
    name="mistral",
    title="Mistral",
    transformers_class="MistralForCausalLM",
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    other_settings=("sliding_window",),
    config_problems=_window_problems,
    readers=ALL_READERS_ANY_SIZE,
)
