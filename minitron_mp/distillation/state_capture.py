"""HiddenStateCapture: store hidden states of a frozen teacher and send them between stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.models.sharded_model import unwrap


class HiddenStateCapture:
    """Forward hooks that store hidden states of the teacher's microbatches.

    routes: (state, stage that computes it, stage that needs it) of each pair, as
        LayerPairs.routes() returns.
    """

    def __init__(
        self, chunks: list[Any], world: World, routes: Sequence[tuple[int, int, int]], num_layers: int
    ):
        self.world = world
        self.routes = routes
        self.config = chunks[0].config
        self.kept: dict[int, list[Tensor]] = {}
        for state in {state for state, *_ in routes}:
            norm = state_norm(chunks, state, num_layers)
            if norm is not None:
                self.kept[state] = []
                norm.register_forward_hook(partial(_keep, self.kept[state]))

    def clear(self) -> None:
        """Delete the stored states."""
        for kept in self.kept.values():
            kept.clear()

    def take(self, batches: Sequence[Batch]) -> list[list[Tensor]]:
        """Return the states that this stage needs, for each microbatch since the last take().

        A state is [s', b, h_t]. The states have the order of the pairs. All ranks of the pipeline
        must call it. It sends one message for each pair with two different stages.
        """
        group, parallel = self.world.groups.pp, self.world.parallel
        b, s = batches[0]["tokens"].shape
        local_length = s // parallel.cp // (parallel.tp if parallel.sequence_parallel else 1)
        shape = (len(batches), local_length, b, self.config.hidden_size)
        arrived, transfers = [], []
        for state, source, target in self.routes:
            if group.rank() == source:
                states = torch.stack(self.kept[state])
            elif group.rank() == target:
                states = torch.empty(shape, dtype=self.config.params_dtype, device=self.world.device)
            if group.rank() == target:
                arrived.append(states)
            if source != target and group.rank() in (source, target):
                act, peer = (dist.isend, target) if group.rank() == source else (dist.irecv, source)
                transfers.append(dist.P2POp(act, states, dist.get_global_rank(group, peer), group))
        for work in dist.batch_isend_irecv(transfers) if transfers else []:
            work.wait()
        self.clear()
        return [[states[i] for states in arrived] for i in range(len(batches))]


def state_norm(chunks: list[Any], state: int, num_layers: int) -> Any:
    """Return the norm that computes a hidden state, or None if it is on a different stage."""
    for chunk in map(unwrap, chunks):
        norms = {layer.layer_number - 1: layer.input_layernorm for layer in chunk.decoder.layers}
        norm = norms.get(state) if state < num_layers else chunk.decoder.final_layernorm
        if isinstance(norm, IdentityOp):
            raise InputError(
                f"layer {state} has a norm that is fused into a linear layer (Megatron's Transformer Engine "
                "spec), and hidden-state distillation needs separate norms; make the model by build_model()"
            )
        if norm is not None:
            return norm
    return None


def _keep(kept: list[Tensor], _: object, __: object, output: Tensor) -> None:
    kept.append(output)
