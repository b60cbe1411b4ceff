"""Checkpoint keys of the parameters, and the dimensions of each parameter.

The keys are Megatron-Core's. They do not depend on the parallel layout. Each layer has separate
keys:

    decoder.layers.7.mlp.linear_fc1.weight      layer 7 of the model, counted from 0
    decoder.final_layernorm.weight              outside the layers

Megatron-Core calls this form non-homogeneous. Layers of one model may then differ in their
parameters and sizes.
"""

from __future__ import annotations

from minitron_mp.models.blocks import dense

LAYERS = "decoder.layers."

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
FINAL_NORM_BIAS = "decoder.final_layernorm.bias"
HEAD = "output_layer.weight"

MODEL_PARAMETERS: dict[str, tuple[str, ...]] = {
    EMBEDDING: ("vocab", "hidden"),
    FINAL_NORM: ("hidden",),
    FINAL_NORM_BIAS: ("hidden",),
    HEAD: ("vocab", "hidden"),
}
"""Checkpoint key -> the dimensions of the tensor, for the parameters outside the layers."""


def layer_key(layer: int, name: str) -> str:
    """Return the checkpoint key of a parameter of one layer."""
    return f"{LAYERS}{layer}.{name}"


def split_key(key: str) -> tuple[int | None, str]:
    """Return the layer and the name inside the layer of a checkpoint key, or None and the key."""
    if not key.startswith(LAYERS):
        return None, key
    number, _, name = key.removeprefix(LAYERS).partition(".")
    return (int(number), name) if number.isdecimal() else (None, key)


def dims_of(key: str) -> tuple[str, ...] | None:
    """Return the dimensions of a parameter, or None for an unknown key."""
    layer, name = split_key(key)
    return MODEL_PARAMETERS.get(name) if layer is None else dense.PARAMETERS.get(name)
