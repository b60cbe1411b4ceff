"""ShardedModel: what a function over a model needs to know, in one argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minitron_mp.models.arch import Arch

if TYPE_CHECKING:
    from minitron_mp.distributed.world import World


@dataclass(frozen=True)
class ShardedModel:
    """One model as this rank holds it.

    chunks: this rank's pipeline chunks in order of depth, bare or wrapped for data parallelism (one without vpp).
    arch: sizes of the whole model. world: layout and process groups. sequence_length: tokens of one sample.
    precision: "bf16" or "fp32", of weights and activations.
    """

    chunks: list[Any]
    arch: Arch
    world: World
    sequence_length: int
    precision: str

    @property
    def last_chunk(self) -> Any:
        """The deepest chunk of this rank. On the last pipeline stage it holds the output head."""
        return self.chunks[-1]
