"""Sizes of the layers on each pipeline stage."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distributed.layout import layers_of_stages, stage_layers
from minitron_mp.models.arch import Arch, BlockArch


@functools.lru_cache(maxsize=4096)
def stage_blocks(arch: Arch, parallel: ParallelConfig) -> list[Counter[BlockArch]]:
    """Return the number of layers of each size on each pipeline stage."""
    if arch.is_uniform:
        counts = stage_layers(arch.num_layers, parallel)
        return [Counter({arch.block: count}) for count in counts]
    stages = layers_of_stages(arch.num_layers, parallel)
    return [Counter(arch.blocks[layer] for layer in layers) for layers in stages]


def mean_over_layers(blocks: Counter[BlockArch], values: Mapping[BlockArch, float]) -> float:
    """Return the mean over the layers of a stage of a value that depends on the layer's size."""
    if len(blocks) == 1:
        return values[next(iter(blocks))]
    return sum(count * values[block] for block, count in blocks.items()) / sum(blocks.values())
