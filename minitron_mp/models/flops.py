"""Floating point operations of a model, per token.

The count follows Megatron-LM and the FP8 papers: a multiply-add is two operations, and causal
attention is half of full attention.
"""

from __future__ import annotations

import math

from minitron_mp.models.arch import Arch, BlockArch


def layer_flops(arch: Arch, sequence_length: int, block: BlockArch | None = None) -> float:
    """Return the operations of one layer's forward pass: matrix products and attention.

    block: sizes of the layer. Default: the sizes of all layers.
    """
    block = block or arch.block
    weights = matrix_elements(arch, block)
    # Scores and values: 2 x 2 x the heads' width x half of the sequence.
    attention = 2 * sequence_length * arch.widths(block).query
    return 2 * weights + attention


def matrix_elements(arch: Arch, block: BlockArch) -> int:
    """Return the number of elements of the weight matrices of a layer."""
    return sum(math.prod(shape) for shape in arch.block_shapes(block).values() if len(shape) == 2)


def head_flops(arch: Arch) -> float:
    """Return the operations of the output layer's forward pass, over the padded vocabulary."""
    return 2 * arch.hidden_size * arch.padded_vocab_size


def forward_flops(arch: Arch, sequence_length: int, *, head: bool = True) -> float:
    """Return the operations of the model's forward pass."""
    layers = 0.0
    for block, count in arch.block_counts().items():
        layers += count * layer_flops(arch, sequence_length, block)
    return layers + (head_flops(arch) if head else 0)


def training_flops(arch: Arch, sequence_length: int) -> float:
    """Return the operations of a forward and a backward pass, without recomputation."""
    return 3 * forward_flops(arch, sequence_length)
