"""ShardedModel: one model as this rank holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_mp.distributed.schedule import Batch, OnOutput, run_schedule
from minitron_mp.distributed.world import World
from minitron_mp.models.arch import Arch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class ShardedModel:
    """One model as this rank holds it.

    chunks: this rank's pipeline chunks in order of depth (one chunk without vpp). They may be
    wrapped for data parallelism. arch: global sizes of the model. world: layout and process groups.
    sequence_length: tokens of one sample. precision: "bf16" or "fp32", of weights and activations.
    """

    chunks: list[Any]
    arch: Arch
    world: World
    sequence_length: int
    precision: str
    folder: Path | None = None
    """The artifact that the weights were loaded from."""

    @property
    def last_chunk(self) -> Any:
        """The deepest chunk of this rank. On the last pipeline stage it holds the output head."""
        return self.chunks[-1]

    def with_chunks(self, chunks: list[Any]) -> ShardedModel:
        """Return the same model with different chunks, for example wrapped ones."""
        return replace(self, chunks=chunks)

    def eval(self) -> ShardedModel:
        """Switch to evaluation mode, and return the model itself."""
        for chunk in self.chunks:
            chunk.eval()
        return self

    def freeze(self) -> ShardedModel:
        """Switch to evaluation mode, turn gradients off, and return the model itself."""
        for chunk in self.chunks:
            chunk.eval().requires_grad_(False)
        return self

    def forward(self, batches: Sequence[Batch], on_output: OnOutput | None = None) -> list[Any]:
        """Run microbatches through the pipeline without gradients; reached by all ranks.

        The last stage runs on_output(hidden, local batch) for each microbatch in order and returns
        the list of its results. The other stages return []. run_schedule() documents the shapes.
        """
        return run_schedule(self.chunks, batches, self.world, on_output)


def logits(model: Any, hidden: Tensor) -> Tensor:
    """Return [s, b, v/tp] from hidden states [s, b, h] after the final norm, on the last stage.

    Under sequence parallelism the hidden states are [s/tp, b, h]. Differentiable.
    """
    return model.output_layer.logits(hidden, output_weight(model))


def output_weight(model: Any) -> Tensor:
    """Return the weight of the output layer [v/tp, h] on the last stage.

    It is the weight of the embedding when they are tied.
    """
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def unwrap(model: Any) -> Any:
    """Return the GPTModel inside DistributedDataParallel."""
    return getattr(model, "module", model)
