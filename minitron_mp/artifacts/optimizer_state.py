"""The distributed optimizer's state as global tensors, so that a run resumes with any layout.

Each data-parallel rank holds a flat piece of the float32 weight, exp_avg and exp_avg_sq of some
parameters. This file joins the pieces, one tensor at a time. The joined tensor has the checkpoint
key and the sharding of the parameter. It is float32 for every precision of the moments, so bf16
moments are saved exactly. The data-parallel ranks share the tensors: each is joined on
its owner, which writes and reads it. So all ranks write about the same number of bytes.

Megatron's format "fully_reshardable" is not used, because it is wrong in 0.16.1 to 0.19.2. It
removes the padding between buckets from a buffer, and then reads parameters at offsets that include
the padding (its source warns "param range exceeds unpadded buffer ... can lead to data
corruption"). A second bucket exists with overlapped reduction, or with tied embeddings under
pipeline parallelism. If the size of the first bucket is not a multiple of 128, the saved moments
are wrong. Use that format when this is fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

PARTS = ("param", "exp_avg", "exp_avg_sq")


@torch.no_grad()
def optimizer_state(optimizer: Any, model: dict[str, Any]) -> dict[str, Any]:
    """Return the sharded state for save_checkpoint(), float32 on the CPU.

    Each data-parallel rank holds the tensors that it owns. It needs 12 bytes of host memory per
    local parameter, divided by the number of data-parallel ranks. model: model_state() of the
    chunks. Reached by all ranks.
    """
    state: dict[str, Any] = {}
    sharded = sharded_by_parameter(model)
    _create_moments(optimizer)
    for number, (shards, parameter, owners) in enumerate(_parameters_and_owners(optimizer)):
        group = shards.data_parallel_group
        piece = local_piece(shards, parameter)
        local = shards._get_main_param_and_optimizer_states(parameter) if piece is not None else {}
        for part in PARTS:
            joined = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if piece is not None:
                joined[piece] = local[part].view(-1)
            if group.size() > 1:
                dist.reduce(joined, group=group, group_dst=owners[part])
            if group.rank() == owners[part]:
                data = joined.view(parameter.shape).cpu()
                state[_name(part, number)] = _like(sharded[id(parameter)], part, data)
    return state


def empty_optimizer_state(optimizer: Any, model: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of optimizer_state(), uninitialised, for load_checkpoint().

    Each data-parallel rank holds the tensors that it owns.
    """
    sharded = sharded_by_parameter(model)
    state: dict[str, Any] = {}
    for number, (shards, parameter, owners) in enumerate(_parameters_and_owners(optimizer)):
        rank = shards.data_parallel_group.rank()
        for part in [part for part in PARTS if owners[part] == rank]:
            empty = torch.empty(parameter.shape, dtype=torch.float32)
            state[_name(part, number)] = _like(sharded[id(parameter)], part, empty)
    return state


@torch.no_grad()
def load_optimizer_state(optimizer: Any, state: dict[str, Any], num_updates: int) -> None:
    """Fill every rank's pieces from the tensors that their owners have loaded.

    num_updates: updates done, for Adam's bias correction. Reached by all ranks.
    """
    for shards in optimizer_parts(optimizer):
        _initialize_moments(shards)
    for number, (shards, parameter, owners) in enumerate(_parameters_and_owners(optimizer)):
        group = shards.data_parallel_group
        piece = local_piece(shards, parameter)
        pieces: dict[str, Tensor] = {}
        for part in PARTS:
            if group.rank() == owners[part]:
                joined = state[_name(part, number)].view(-1).to(parameter.device)
            else:
                joined = torch.empty(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if group.size() > 1:
                dist.broadcast(joined, group=group, group_src=owners[part])
            if piece is not None:
                pieces[part] = joined[piece].clone()
        if piece is not None:
            shards._set_main_param_and_optimizer_states(parameter, pieces)
    for shards in optimizer_parts(optimizer):
        _set_num_updates(shards.optimizer, num_updates)


def _create_moments(optimizer: Any) -> None:
    """Create the moments before the first update, for a checkpoint after skipped steps only."""
    for shards in optimizer_parts(optimizer):
        if not shards.optimizer.state:
            _initialize_moments(shards)
            _set_num_updates(shards.optimizer, 0)


def _initialize_moments(shards: Any) -> None:
    """Create the moments of this rank's pieces, with zeros."""
    adam = shards.optimizer
    if not shards.config.use_precision_aware_optimizer:
        shards.init_state_fn(adam, shards.config)
        return
    # init_state_fn() of Megatron-Core 0.16 to 0.19 omits an argument that Transformer Engine 2.1 and
    # later require.
    for group in adam.param_groups:
        for piece in group["params"]:
            if not adam.state[piece]:
                adam.initialize_state(piece, store_param_remainders=False)


def _set_num_updates(adam: Any, num_updates: int) -> None:
    for group in adam.param_groups:
        group["step"] = num_updates
    # On a GPU without Apex and TE Megatron uses torch's Adam, with a step per parameter.
    if isinstance(adam, torch.optim.Adam):
        for moments in adam.state.values():
            moments["step"] = torch.tensor(float(num_updates))


def sharded_by_parameter(model: dict[str, Any]) -> dict[int, Any]:
    """Return id(parameter) -> its entry in the sharded state."""
    return {id(entry.data): entry for entry in nested_values(model)}


def parameters_of(optimizer: Any) -> Iterator[tuple[Any, torch.nn.Parameter]]:
    """Yield (distributed optimizer, parameter), in the same order on all data-parallel ranks."""
    for shards in optimizer_parts(optimizer):
        for buffer in shards.buffers:
            for parameter in buffer.param_index_map:
                yield shards, parameter


def _parameters_and_owners(optimizer: Any) -> Iterator[tuple[Any, torch.nn.Parameter, dict[str, int]]]:
    """Yield (distributed optimizer, parameter, part -> rank of its owner in the data-parallel group).

    The order and the owners are the same on all data-parallel ranks. The parts of one parameter have
    different owners, because embeddings are a large share of a model.
    """
    for shards in optimizer_parts(optimizer):
        owned = [0] * shards.data_parallel_group.size()
        for _, parameter in parameters_of(shards):
            owners = {}
            for part in PARTS:
                owners[part] = owned.index(min(owned))
                owned[owners[part]] += parameter.numel()
            yield shards, parameter, owners


def optimizer_parts(optimizer: Any) -> list[Any]:
    """Return the DistributedOptimizers of an optimizer, which may be a chain of them."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def local_piece(shards: Any, parameter: torch.nn.Parameter) -> slice | None:
    """Return the elements of the flat parameter that this rank holds, or None if it holds none."""
    if parameter not in shards.model_param_gbuf_map:
        return None
    piece = shards._get_model_param_range_map(parameter)["param"]
    return slice(piece.start, piece.end)


def _name(part: str, number: int) -> str:
    return f"optimizer.{part}.{number}"


def _like(sharded: Any, part: str, data: Tensor) -> Any:
    """Return float32 data with a parameter's sharding: a ShardedTensor or a factory of them.

    Its owner writes it, although the owner may hold a replica of the parameter that is not written.
    The last number of a replica is its data-parallel rank.
    """
    changed = {
        "key": f"optimizer.{part}.{sharded.key}",
        "data": data,
        "replica_id": (*sharded.replica_id[:-1], 0),
    }
    if isinstance(sharded, ShardedTensor):
        changed["dtype"] = torch.float32
    return replace(sharded, **changed)
