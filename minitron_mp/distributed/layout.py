"""Layers of each pipeline stage."""

from __future__ import annotations

from minitron_mp.config.parallel import ParallelConfig


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Return the number of layers on each pipeline stage."""
    counts = parallel.layers_of_chunks(num_layers)
    return [sum(counts[stage :: parallel.pp]) for stage in range(parallel.pp)]


def layers_of_stages(num_layers: int, parallel: ParallelConfig) -> list[list[int]]:
    """Return the layer numbers of each pipeline stage. With vpp they are listed chunk by chunk."""
    numbers = iter(range(num_layers))
    chunks = [[next(numbers) for _ in range(count)] for count in parallel.layers_of_chunks(num_layers)]
    return [
        [layer for chunk in chunks[stage :: parallel.pp] for layer in chunk] for stage in range(parallel.pp)
    ]
