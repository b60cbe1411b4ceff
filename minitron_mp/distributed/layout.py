"""What a run needs before it runs: parameters and memory per rank, from sizes alone.

Weights, gradients and optimizer state are exact for this library's layout, and so is the number of layers in flight. Bytes of activations are
counted tensor by tensor (kept_per_token); a run's peak also has the allocator's slack.
"""

from __future__ import annotations

from minitron_mp.config.parallel import ParallelConfig


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers on each pipeline stage."""
    counts = parallel.layers_of_chunks(num_layers)
    return [sum(counts[stage :: parallel.pp]) for stage in range(parallel.pp)]
