"""Activation memory of one layer, and how many layers hold activations at the same time."""

from __future__ import annotations

import functools

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.models.arch import Arch


@functools.lru_cache(maxsize=4096)
def layers_in_flight(num_layers: int, parallel: ParallelConfig, num_microbatches: int, stage: int) -> int:
    """Return the largest number of (layer, microbatch) pairs of a stage that wait for backward.

    Megatron's schedules run pp - stage - 1 forward passes before the first backward pass
    (arXiv 2104.04473). The interleaved schedule runs twice that number, and pp more for each model
    chunk except one. The chunks take turns of pp microbatches.
    """
    layers = parallel.layers_of_chunks(num_layers)[stage :: parallel.pp]
    if not parallel.vpp:
        return layers[0] * min(parallel.pp - stage, num_microbatches)
    simulated = min(num_microbatches, 4 * parallel.pp)  # the pattern repeats after that
    turn = [chunk for chunk in range(parallel.vpp) for _ in range(parallel.pp)]
    order = turn * (simulated // parallel.pp)
    warm_up = min(len(order), 2 * (parallel.pp - stage - 1) + (parallel.vpp - 1) * parallel.pp)
    in_flight = peak = sum(layers[chunk] for chunk in order[:warm_up])
    for forward, backward in zip(order[warm_up:], order):
        in_flight += layers[forward]
        peak = max(peak, in_flight)
        in_flight -= layers[parallel.vpp - 1 - backward]
    return peak


def activation_bytes_per_token(
    arch: Arch,
    parallel: ParallelConfig,
    value_bytes: int,
    *,
    transformer_engine: bool = False,
    fp8: bool = False,
) -> float:
    """Return the bytes per token that one layer's forward pass saves for backward on one rank.

    The layers of arch must have equal sizes; see Arch.with_block().

    Local layers save the input and output of both norms; q, k and v as one tensor (v is a view of
    it); rotated q and k; the attention output; the first MLP product and, with a gate, the
    activation, the other half and their product. Transformer Engine saves no rotated copy of q and
    k, and fuses the gate; in FP8 a tensor that only matrix products read takes one byte per value.
    Sequence parallelism splits tensors of width h, tensor parallelism splits all other tensors.
    """
    sequence_split = parallel.tp if parallel.sequence_parallel else 1
    widths = arch.widths()
    softmax_statistics = 4 * arch.num_attention_heads / parallel.tp
    if transformer_engine:
        product_bytes = 1 if fp8 else value_bytes
        inner = value_bytes * (widths.qkv + widths.query + widths.fc1)
        inner += product_bytes * widths.fc2 + (widths.query if fp8 else 0)
        norms = 2 * arch.hidden_size * (value_bytes + product_bytes) / sequence_split
        return norms + inner / parallel.tp + softmax_statistics
    # With context parallelism the gathered keys and values replace the qkv product. The attention
    # mask of the local layers, [s/cp, s], is not counted.
    keys_and_values = 2 * widths.key * parallel.cp if parallel.cp > 1 else widths.qkv + widths.key
    attention = 2 * widths.query + keys_and_values
    # The q norm copies q, unless a rank has one query group: then q is a view, too.
    if arch.qk_norm and arch.num_query_groups > parallel.tp:
        attention += widths.query
    inner = attention + (5 if arch.gated else 2) * widths.fc2
    return value_bytes * (4 * arch.hidden_size / sequence_split + inner / parallel.tp) + softmax_statistics
