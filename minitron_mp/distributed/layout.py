"""Which ranks hold what: layers of each pipeline stage."""

from __future__ import annotations

from minitron_mp.config.parallel import ParallelConfig


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Return the number of layers on each pipeline stage."""
    counts = parallel.layers_of_chunks(num_layers)
    return [sum(counts[stage :: parallel.pp]) for stage in range(parallel.pp)]
