"""The sizes of a transformer, and the table that says which axis of which parameter is which model axis.

Everything that prunes, converts or counts reads AXES. Its keys are Megatron-Core's checkpoint keys, which do not depend on
the parallel layout: layers are stacked on dim 0, so a key with axis "layer" is one global tensor of all layers.

    h hidden  f ffn  v padded vocabulary  np heads  ng query groups  hn head width  L layers

The qkv rows are interleaved by query group. With 4 heads in 2 groups the "heads" along dim 1 of linear_qkv.weight are
    q0 q1 k0 v0  q2 q3 k1 v1        each hn rows
and fc1 holds all gate rows, then all up rows: (2f, h); without a gate the up rows alone: (f, h).
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator

from minitron_mp.errors import InputError

LAYER = "decoder.layers."

ATTENTION, MLP = LAYER + "self_attention.", LAYER + "mlp."

AXES: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": ("vocab", "hidden"),
    ATTENTION + "linear_qkv.layer_norm_weight": ("layer", "hidden"),
    ATTENTION + "linear_qkv.layer_norm_bias": ("layer", "hidden"),
    ATTENTION + "linear_qkv.weight": ("layer", "qkv", "hidden"),
    ATTENTION + "linear_qkv.bias": ("layer", "qkv"),
    ATTENTION + "q_layernorm.weight": ("layer", "head_width"),
    ATTENTION + "k_layernorm.weight": ("layer", "head_width"),
    ATTENTION + "linear_proj.weight": ("layer", "hidden", "heads"),
    MLP + "linear_fc1.layer_norm_weight": ("layer", "hidden"),
    MLP + "linear_fc1.layer_norm_bias": ("layer", "hidden"),
    MLP + "linear_fc1.weight": ("layer", "gate_up", "hidden"),
    MLP + "linear_fc2.weight": ("layer", "hidden", "ffn"),
    "decoder.final_layernorm.weight": ("hidden",),
    "decoder.final_layernorm.bias": ("hidden",),
    "output_layer.weight": ("vocab", "hidden"),
}

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this at every layout, so that global shapes never depend on tp."""

FP8_MULTIPLE = 16

AS_MISTRAL = "set export.family: mistral (same computation)"


class BlockArch(BaseModel):
    """Sizes of one layer. Layers of one model may differ in them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups


BLOCK_SIZES = tuple(BlockArch.model_fields)


class Arch(BaseModel):
    """Sizes and switches of one decoder, in Megatron-Core's words. Written to disk in every artifact.

    A model whose layers are alike is one block repeated. It is also built from, and written as, num_layers and the
    sizes of that block: Arch(num_layers=32, ffn_hidden_size=9216, ...).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str
    hidden_size: int
    blocks: tuple[BlockArch, ...]
    """One for each layer, the first layer first."""
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    norm: Literal["rms", "layer1p"] = "rms"
    """rms: RMSNorm. layer1p: LayerNorm with a bias and a weight that is stored less one."""
    activation: Literal["swiglu", "squared_relu"] = "swiglu"
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    """Share of each head's width that is rotated."""
    rope_scaling_factor: float | None = None
    """Llama 3 frequency scaling (low 1, high 4, original context 8192, as Megatron-Core has it), or none."""

    @model_validator(mode="before")
    @classmethod
    def _repeat_block(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "blocks" in value:
            return value
        block = {name: value[name] for name in BLOCK_SIZES if name in value}
        others = {name: size for name, size in value.items() if name not in (*BLOCK_SIZES, "num_layers")}
        return {**others, "blocks": (BlockArch(**block),) * value["num_layers"]}

    @model_serializer(mode="wrap")
    def _write_one_block(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = handler(self)
        if not self.is_uniform or "blocks" not in fields:
            return fields
        del fields["blocks"]
        return {**fields, **self.sizes()}

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same sizes."""
        first = self.blocks[0]
        return all(block is first or block == first for block in self.blocks)

    @property
    def block(self) -> BlockArch:
        """The one block of a model whose layers are alike. InputError where they differ."""
        if not self.is_uniform:
            raise InputError(
                "the layers of this model differ in size; this step needs a model whose layers are alike: "
                "give one size for all layers in the plan or the target"
            )
        return self.blocks[0]

    @property
    def ffn_hidden_size(self) -> int:
        """Of every layer. InputError where they differ, as for the two sizes below."""
        return self.block.ffn_hidden_size

    @property
    def num_attention_heads(self) -> int:
        return self.block.num_attention_heads

    @property
    def num_query_groups(self) -> int:
        return self.block.num_query_groups

    def sizes(self) -> dict[str, int]:
        """Name -> size of everything that pruning may change, of a model whose layers are alike."""
        return {"num_layers": self.num_layers, "hidden_size": self.hidden_size, **dict(self.block)}

    def resized(self, **fields: Any) -> Arch:
        """The architecture with other fields, sizes of its blocks or num_layers.

        A size that is given for a block holds for all of them. num_layers repeats the one block.
        """
        block = {name: fields.pop(name) for name in BLOCK_SIZES if name in fields}
        blocks = fields.pop("blocks", self.blocks)
        if "num_layers" in fields:
            blocks = (self.block,) * fields.pop("num_layers")
        if block:
            changed = {
                id(each): each.model_copy(update=block) for each in blocks
            }  # one copy of a repeated block
            blocks = tuple(changed[id(each)] for each in blocks)
        return self.model_copy(update={**fields, "blocks": blocks})

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def gated(self) -> bool:
        return self.activation == "swiglu"

    @property
    def heads_per_group(self) -> int:
        return self.block.heads_per_group

    def axis_size(self, axis: str) -> int:
        """Elements of the model axis in a weight of this architecture."""
        return {
            "layer": self.num_layers,
            "vocab": self.padded_vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "gate_up": (1 + self.gated) * self.ffn_hidden_size,
            "heads": self.num_attention_heads * self.kv_channels,
            "qkv": (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels,
            "head_width": self.kv_channels,
        }[axis]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint key -> global shape, for the parameters that this architecture has."""
        absent = set()
        if self.tied:
            absent.add("output_layer.weight")
        if not self.qkv_bias:
            absent.add(ATTENTION + "linear_qkv.bias")
        if not self.qk_norm:
            absent |= {ATTENTION + "q_layernorm.weight", ATTENTION + "k_layernorm.weight"}
        if self.norm == "rms":
            absent |= {key for key in AXES if key.endswith(("layer_norm_bias", "final_layernorm.bias"))}
        return {key: tuple(map(self.axis_size, axes)) for key, axes in AXES.items() if key not in absent}

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Parameters without the vocabulary padding; tied embeddings count once. embeddings=False leaves both out."""
        vocab = {key: axes for key, axes in AXES.items() if "vocab" in axes}
        total = sum(math.prod(shape) for key, shape in self.shapes().items() if key not in vocab)
        return total + embeddings * (1 if self.tied else 2) * self.vocab_size * self.hidden_size


def layout_problems(arch: Arch, tp: int) -> list[str]:
    """What stops this architecture from being cut tp ways, one sentence each; empty when nothing does."""
    sizes = {
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "padded vocabulary": arch.padded_vocab_size,
    }
    return [
        f"tensor parallel size {tp} does not divide {name} {n}; use a divisor of {n}"
        for name, n in sizes.items()
        if n % tp
    ]


def fp8_problems(arch: Arch, tp: int, tokens: int) -> list[str]:
    """What stops the linear layers from running in FP8, one sentence each. tokens: of one sample, as a rank quantises them.

    The products want rows of whole 16 bytes in both operands, forward and backward, so each of their sizes is a multiple of 16.
    """
    qkv, proj = arch.axis_size("qkv") // tp, arch.axis_size("heads") // tp
    sizes = {
        "hidden_size": arch.hidden_size,
        f"ffn_hidden_size / tp ({arch.ffn_hidden_size} / {tp})": arch.ffn_hidden_size // tp,
        "num_attention_heads x kv_channels / tp": proj,
        "(num_attention_heads + 2 num_query_groups) x kv_channels / tp": qkv,
        "the tokens of a sample on a rank": tokens,
    }
    return [
        f"FP8 wants multiples of {FP8_MULTIPLE}, {name} is {n}; nearest {max(1, round(n / FP8_MULTIPLE)) * FP8_MULTIPLE}"
        for name, n in sizes.items()
        if n % FP8_MULTIPLE
    ]


def export_problems(arch: Arch) -> list[str]:
    """What stops the exported Hugging Face model from loading, one sentence each."""
    if arch.family == "llama" and arch.hidden_size % arch.num_attention_heads:
        # transformers 5 validates this in LlamaConfig even when head_dim is explicit (transformers#46211).
        near = round(arch.hidden_size / arch.num_attention_heads) * arch.num_attention_heads
        return [
            f"transformers refuses a Llama with hidden_size {arch.hidden_size} that is no multiple of "
            f"num_attention_heads {arch.num_attention_heads}; nearest hidden_size {near}, or {AS_MISTRAL}"
        ]
    return []
