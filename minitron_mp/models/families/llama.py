"""Llama."""

from __future__ import annotations

from minitron_mp.models.arch import Arch
from minitron_mp.models.families.family import ExportAs, Family
from minitron_mp.models.families.readers import (
    ALL_READERS_ANY_SIZE,
    hidden_is_heads_times_head_dim,
    hidden_is_multiple_of_heads,
)


def _ctranslate2(arch: Arch) -> str:
    """CTranslate2 4.8 computes head_dim from hidden_size, and the frequencies without scaling."""
    if arch.rope_scaling_factor is not None:
        return "it computes the rotary frequencies without the scaling of Llama 3"
    return hidden_is_heads_times_head_dim(arch)


def _mistral_problems(arch: Arch) -> list[str]:
    if arch.rope_scaling_factor is None:
        return []
    return [
        "this Llama scales its rotary frequencies, and the configuration of Mistral has no key for it; "
        "export it as llama"
    ]


LLAMA = Family(
    name="llama",
    title="Llama",
    transformers_class="LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048},
    # LlamaConfig of transformers 5 checks it even if head_dim is given (transformers#46211).
    heads_divide_hidden=True,
    readers={
        **ALL_READERS_ANY_SIZE,
        "transformers 5": hidden_is_multiple_of_heads,
        "vLLM": hidden_is_multiple_of_heads,  # it reads config.json with transformers
        "CTranslate2": _ctranslate2,
    },
    exports_as={
        "mistral": ExportAs(
            drop=("pretraining_tp", "attention_bias", "mlp_bias"),
            add={"sliding_window": None},
            problems=_mistral_problems,
        )
    },
)
