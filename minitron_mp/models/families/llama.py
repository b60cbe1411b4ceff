"""Llama."""

from __future__ import annotations

from minitron_mp.models.arch import Arch
from minitron_mp.models.families.family import ExportAs, ExportProblem, Family
from minitron_mp.models.families.readers import READS_HEAD_DIM, heads_times_head_dim, multiple_of_heads

AS_MISTRAL = "set export.family: mistral (same computation)"


def _head_problems(arch: Arch) -> list[ExportProblem]:
    """Return a problem unless the number of heads divides hidden_size.

    LlamaConfig of transformers 5 checks it even if head_dim is given (transformers#46211).
    """
    hidden_size, heads = arch.hidden_size, arch.num_attention_heads
    if hidden_size % heads == 0:
        return []
    nearest = round(hidden_size / heads) * heads
    return [
        ExportProblem(
            text=f"transformers rejects a Llama with hidden_size {hidden_size} that is not a multiple of "
            f"num_attention_heads {heads}; nearest hidden_size {nearest}, or {AS_MISTRAL}",
            reason=f"transformers rejects a Llama whose hidden_size is not a multiple of "
            f"num_attention_heads {heads}; {AS_MISTRAL}",
        )
    ]


def _ctranslate2(arch: Arch) -> str:
    """CTranslate2 4.8 computes head_dim from hidden_size, and the frequencies without scaling."""
    if arch.rope_scaling_factor is not None:
        return "it computes the rotary frequencies without the scaling of Llama 3"
    return heads_times_head_dim(arch)


def _mistral_problems(arch: Arch) -> list[str]:
    if arch.rope_scaling_factor is None:
        return []
    return [
        "this Llama scales its rotary frequencies, and the configuration of Mistral has no key for it; "
        "export it as llama"
    ]


LLAMA = Family(
    name="llama",
    transformers_class="LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048},
    export_problems=_head_problems,
    readers={
        **READS_HEAD_DIM,
        "transformers 5": multiple_of_heads,
        "vLLM": multiple_of_heads,  # it reads config.json with transformers
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
