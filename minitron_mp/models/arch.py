"""The sizes and switches of a decoder, and the shapes of its parameters.

h hidden  f ffn  v padded vocabulary  np heads  ng query groups  hn head width
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator

from minitron_mp.errors import InputError
from minitron_mp.models.blocks.dense import LayerWidths, block_parameters, dim_sizes, layer_widths
from minitron_mp.models.parameters import EMBEDDING, FINAL_NORM, FINAL_NORM_BIAS, HEAD, layer_key

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, so that global shapes do not depend on tp."""

FP8_MULTIPLE = 16
"""FP8 products need rows of 16 bytes, one byte per element."""


class BlockArch(BaseModel):
    """Sizes of one layer. Layers of one model may have different sizes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups


BLOCK_SIZES = tuple(BlockArch.model_fields)

SPLIT_SIZES = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
"""Sizes of a block that tensor parallelism splits."""


class Arch(BaseModel):
    """Sizes and switches of one decoder, with the names of Megatron-Core. Manifests contain it.

    If all layers have the same sizes, the model is one repeated block. Then Arch accepts num_layers
    and the sizes of that block, Arch(num_layers=32, ffn_hidden_size=9216, ...), and writes them.
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
    """rms: RMSNorm. layer1p: LayerNorm with a bias; its weight is stored minus one."""
    activation: Literal["swiglu", "squared_relu"] = "swiglu"
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    """Fraction of each head's width that is rotated."""
    rope_scaling_factor: float | None = None
    """Factor of Llama 3 frequency scaling, None without it.

    Megatron-Core fixes the remaining values: low 1, high 4, original context 8192.
    """

    @model_validator(mode="before")
    @classmethod
    def _repeat_block(cls, value: object) -> object:
        if not isinstance(value, dict) or "blocks" in value:
            return value
        block = {name: value[name] for name in BLOCK_SIZES if name in value}
        fields = {name: size for name, size in value.items() if name not in (*BLOCK_SIZES, "num_layers")}
        num_layers = value.get("num_layers")
        if not isinstance(num_layers, int) or num_layers < 1:
            raise ValueError(f"num_layers is {num_layers!r}, not a positive integer; or give blocks")
        return {**fields, "blocks": (BlockArch(**block),) * num_layers}

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
        """The block of all layers. InputError if the layers have different sizes."""
        if not self.is_uniform:
            raise InputError(
                "the layers of this model differ in size, and this step needs layers of equal size; "
                "give one size for all layers in the plan or the target"
            )
        return self.blocks[0]

    @property
    def ffn_hidden_size(self) -> int:
        """Size in every layer. InputError if layers differ, also for the next two properties."""
        return self.block.ffn_hidden_size

    @property
    def num_attention_heads(self) -> int:
        return self.block.num_attention_heads

    @property
    def num_query_groups(self) -> int:
        return self.block.num_query_groups

    def block_counts(self) -> Counter[BlockArch]:
        """Return block -> number of layers that have it."""
        if self.is_uniform:  # faster, because it does not hash each layer
            return Counter({self.blocks[0]: self.num_layers})
        return Counter(self.blocks)

    def with_block(self, block: BlockArch) -> Arch:
        """Return the architecture with this block in every layer."""
        return self.model_copy(update={"blocks": (block,) * self.num_layers})

    def sizes(self) -> dict[str, int]:
        """Return name -> size of all sizes that pruning may change. The layers must be equal."""
        return {"num_layers": self.num_layers, "hidden_size": self.hidden_size, **dict(self.block)}

    def resized(
        self,
        *,
        num_layers: int | None = None,
        hidden_size: int | None = None,
        ffn_hidden_size: int | None = None,
        num_attention_heads: int | None = None,
        num_query_groups: int | None = None,
    ) -> Arch:
        """Return the architecture with other sizes. Default: the present sizes.

        A size of a block applies to all layers. num_layers repeats the block, so the layers must be
        equal.
        """
        blocks = self.blocks if num_layers is None else (self.block,) * num_layers
        sizes = {
            "ffn_hidden_size": ffn_hidden_size,
            "num_attention_heads": num_attention_heads,
            "num_query_groups": num_query_groups,
        }
        given = {name: size for name, size in sizes.items() if size is not None}
        if given:  # copy a repeated block once
            changed = {id(block): block.model_copy(update=given) for block in blocks}
            blocks = tuple(changed[id(block)] for block in blocks)
        width = self.hidden_size if hidden_size is None else hidden_size
        return self.model_copy(update={"hidden_size": width, "blocks": blocks})

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def gated(self) -> bool:
        return self.activation == "swiglu"

    @property
    def heads_per_group(self) -> int:
        return self.block.heads_per_group

    @property
    def norm_has_bias(self) -> bool:
        return self.norm != "rms"

    def dim_size(self, dim: str, block: BlockArch | None = None) -> int:
        """Return the size of a dimension that the tables of parameters name.

        block: block of the layer that has the parameter. Default: the block of all layers;
        InputError if they differ.
        """
        if dim == "hidden":
            return self.hidden_size
        if dim == "vocab":
            return self.padded_vocab_size
        return dim_sizes(self, block or self.block)[dim]

    def widths(self, block: BlockArch | None = None) -> LayerWidths:
        """Return the widths of the activations inside a layer; block as for dim_size()."""
        return layer_widths(self, block or self.block)

    def block_shapes(self, block: BlockArch) -> dict[str, tuple[int, ...]]:
        """Return name inside the layer -> global shape, for a layer of these sizes."""
        sizes = {"hidden": self.hidden_size, **dim_sizes(self, block)}
        return {name: tuple(sizes[dim] for dim in dims) for name, dims in block_parameters(self).items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return checkpoint key -> global shape of each parameter, embedding first, head last."""
        vocabulary = (self.padded_vocab_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: vocabulary}
        of_block = {block: self.block_shapes(block) for block in self.block_counts()}
        for layer, block in enumerate(self.blocks):
            shapes |= {layer_key(layer, name): shape for name, shape in of_block[block].items()}
        shapes[FINAL_NORM] = (self.hidden_size,)
        if self.norm_has_bias:
            shapes[FINAL_NORM_BIAS] = (self.hidden_size,)
        if not self.tied:
            shapes[HEAD] = vocabulary
        return shapes

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Return the number of parameters without the padding of the vocabulary.

        Tied embeddings count once. embeddings=False excludes embedding and output layer.
        """
        total = (2 if self.norm_has_bias else 1) * self.hidden_size
        for block, count in self.block_counts().items():
            total += count * sum(math.prod(shape) for shape in self.block_shapes(block).values())
        if embeddings:
            total += (1 if self.tied else 2) * self.vocab_size * self.hidden_size
        return total


def layout_problems(arch: Arch, tp: int) -> list[str]:
    """Return why tensor parallelism cannot split this architecture into tp parts, as sentences."""
    blocks = _named_blocks(arch)
    sizes = [(name, where, getattr(block, name)) for block, where in blocks for name in SPLIT_SIZES]
    sizes.append(("padded vocabulary", "", arch.padded_vocab_size))
    return [
        f"tensor parallel size {tp} does not divide {name} {size}{where}; use a divisor of {size}"
        for name, where, size in sizes
        if size % tp
    ]


def fp8_problems(arch: Arch, tp: int, tokens: int) -> list[str]:
    """Return the reasons why the linear layers cannot run in FP8, one sentence each.

    FP8 products need rows of a multiple of 16 bytes in both operands, forward and backward. So each
    size must be a multiple of 16. tokens: tokens of one sample that one rank quantises.
    """
    sizes = {"hidden_size": arch.hidden_size}
    for block, where in _named_blocks(arch):
        widths = layer_widths(arch, block)
        ffn = block.ffn_hidden_size
        sizes[f"ffn_hidden_size / tp ({ffn} / {tp}){where}"] = ffn // tp
        sizes[f"num_attention_heads x kv_channels / tp{where}"] = widths.query // tp
        qkv = "(num_attention_heads + 2 num_query_groups) x kv_channels / tp"
        sizes[f"{qkv}{where}"] = widths.qkv // tp
    sizes["the tokens of a sample on a rank"] = tokens
    return [
        f"FP8 needs multiples of {FP8_MULTIPLE}, {name} is {size}; nearest {_nearest_multiple(size)}"
        for name, size in sizes.items()
        if size % FP8_MULTIPLE
    ]


def _named_blocks(arch: Arch) -> list[tuple[BlockArch, str]]:
    """Return each different block with " in layer 0, 2", or with "" if all layers are equal."""
    if arch.is_uniform:
        return [(arch.block, "")]
    layers: dict[BlockArch, list[int]] = {}
    for layer, block in enumerate(arch.blocks):
        layers.setdefault(block, []).append(layer)
    return [(block, f" in layer {', '.join(map(str, numbers))}") for block, numbers in layers.items()]


def _nearest_multiple(size: int) -> int:
    return max(1, round(size / FP8_MULTIPLE)) * FP8_MULTIPLE
