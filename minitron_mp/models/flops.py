"""Floating point operations of a model, counted as Megatron-LM and the FP8 papers do: a multiply-add is two, causal attention is half of full."""

from __future__ import annotations

import math

from minitron_mp.models.arch import AXES, Arch


def layer_flops(arch: Arch, sequence_length: int) -> float:
    """Of one layer's forward pass, a token: its matrix products, and attention over the sequence."""
    weights = sum(
        math.prod(shape[1:])
        for key, shape in arch.shapes().items()
        if AXES[key][0] == "layer" and len(shape) == 3
    )
    attention = (
        2 * sequence_length * arch.axis_size("heads")
    )  # scores and values: 2 x 2 x heads' width x half of the sequence
    return 2 * weights + attention


def head_flops(arch: Arch) -> float:
    """Of the output layer's forward pass, a token, over the padded vocabulary."""
    return 2 * arch.hidden_size * arch.padded_vocab_size


def forward_flops(arch: Arch, sequence_length: int, *, head: bool = True) -> float:
    """Of the model's forward pass, a token."""
    return arch.num_layers * layer_flops(arch, sequence_length) + head * head_flops(arch)


def training_flops(arch: Arch, sequence_length: int) -> float:
    """Of forward and backward pass, a token; what is computed twice for want of memory does not count."""
    return 3 * forward_flops(arch, sequence_length)
