"""A dense decoder layer: attention and an MLP. Each of them follows a norm.

    h hidden  f ffn  np heads  ng query groups  hn head width

The rows of linear_qkv are interleaved by query group. With 4 heads in 2 groups they are
    q0 q1 k0 v0  q2 q3 k1 v1        each hn rows
linear_fc1 holds all gate rows, then all up rows: (2f, h). Without a gate it holds up rows: (f, h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minitron_mp.models.arch import Arch, BlockArch

ATTENTION = "self_attention."
MLP = "mlp."

PARAMETERS: dict[str, tuple[str, ...]] = {
    ATTENTION + "linear_qkv.layer_norm_weight": ("hidden",),
    ATTENTION + "linear_qkv.layer_norm_bias": ("hidden",),
    ATTENTION + "linear_qkv.weight": ("qkv", "hidden"),
    ATTENTION + "linear_qkv.bias": ("qkv",),
    ATTENTION + "q_layernorm.weight": ("head_width",),
    ATTENTION + "k_layernorm.weight": ("head_width",),
    ATTENTION + "linear_proj.weight": ("hidden", "heads"),
    MLP + "linear_fc1.layer_norm_weight": ("hidden",),
    MLP + "linear_fc1.layer_norm_bias": ("hidden",),
    MLP + "linear_fc1.weight": ("gate_up", "hidden"),
    MLP + "linear_fc2.weight": ("hidden", "ffn"),
}
"""Name of a parameter inside its layer -> the dimensions of the tensor."""


def block_parameters(arch: Arch) -> dict[str, tuple[str, ...]]:
    """Return the part of PARAMETERS that a layer of this architecture has."""
    absent = set()
    if not arch.qkv_bias:
        absent.add(ATTENTION + "linear_qkv.bias")
    if not arch.qk_norm:
        absent |= {ATTENTION + "q_layernorm.weight", ATTENTION + "k_layernorm.weight"}
    if not arch.norm_has_bias:
        absent |= {name for name in PARAMETERS if name.endswith("layer_norm_bias")}
    return {name: dims for name, dims in PARAMETERS.items() if name not in absent}


@dataclass(frozen=True)
class LayerWidths:
    """Channels of the activations inside a layer. Tensor parallelism splits all of them."""

    query: int
    """np hn: the queries, and the output of attention."""
    key: int
    """ng hn: the keys, or the values."""
    fc1: int
    """Output of linear_fc1: gate and up, or up without a gate."""
    fc2: int
    """Input of linear_fc2."""

    @property
    def qkv(self) -> int:
        """Output of linear_qkv."""
        return self.query + 2 * self.key


def layer_widths(arch: Arch, block: BlockArch) -> LayerWidths:
    """Return the widths of the activations inside a layer of these sizes."""
    return LayerWidths(
        query=block.num_attention_heads * arch.kv_channels,
        key=block.num_query_groups * arch.kv_channels,
        fc1=(2 if arch.gated else 1) * block.ffn_hidden_size,
        fc2=block.ffn_hidden_size,
    )


def dim_sizes(arch: Arch, block: BlockArch) -> dict[str, int]:
    """Return dimension -> size, for the dimensions that depend on the sizes of the layer."""
    widths = layer_widths(arch, block)
    return {
        "ffn": widths.fc2,
        "gate_up": widths.fc1,
        "heads": widths.query,
        "qkv": widths.qkv,
        "head_width": arch.kv_channels,
    }
