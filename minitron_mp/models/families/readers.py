"""The programs that read an exported folder, and what each requires of the sizes of a model.

Pruning changes hidden_size and the number of heads but not the width of a head. So hidden_size is
often no longer num_attention_heads x head_dim. Some readers compute the width of a head as
hidden_size / num_attention_heads instead of reading head_dim, and then expect weights of other
shapes. `bash tests/run.sh --readers` runs the readers that run on a CPU; vLLM's rule is from its
source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from minitron_mp.models.arch import Arch

READERS = ("transformers 5", "transformers 4", "vLLM", "llama.cpp", "CTranslate2")

ReaderRule = Callable[[Arch], str]
"""Architecture -> the reason why a reader does not accept the model, or "" if it does."""


def any_size(arch: Arch) -> str:
    """The reader reads head_dim of config.json."""
    return ""


def hidden_is_multiple_of_heads(arch: Arch) -> str:
    """The reader rejects a hidden_size that is not a multiple of num_attention_heads."""
    hidden_size, heads = arch.hidden_size, arch.num_attention_heads
    if hidden_size % heads == 0:
        return ""
    return f"it needs a hidden_size that is a multiple of num_attention_heads, here {hidden_size} and {heads}"


def hidden_is_heads_times_head_dim(arch: Arch) -> str:
    """The reader computes head_dim as hidden_size / num_attention_heads."""
    heads, head_dim = arch.num_attention_heads, arch.kv_channels
    if arch.hidden_size == heads * head_dim:
        return ""
    return (
        f"it does not read head_dim, so it needs hidden_size = num_attention_heads x head_dim, here "
        f"{arch.hidden_size} and {heads} x {head_dim} = {heads * head_dim}"
    )


def not_supported(arch: Arch) -> str:
    """The reader does not have the family."""
    return "it does not support this family"


ALL_READERS_ANY_SIZE: Mapping[str, ReaderRule] = dict.fromkeys(READERS, any_size)
"""Rules of a family of which every known reader accepts every size."""
