"""The distributed optimizer's state as global tensors, so that a checkpoint resumes at any layout.

Each data parallel rank holds a flat piece of the float32 weight, exp_avg and exp_avg_sq of some parameters. Here they are put
together, one tensor at a time, under the parameter's own checkpoint key and sharding.

Why not Megatron's own "fully_reshardable" format: in 0.16.1 to 0.19.2 it cuts parameters out of buffers from which the padding
between buckets was removed, at offsets that still count it (its source warns "param range exceeds unpadded buffer ... can
lead to data corruption"). A second bucket exists with overlapped reduction, or with tied embeddings under pipeline
parallelism; whenever the first one's size is no multiple of 128, the saved moments are wrong. Go back to it when that is fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

PARTS = ("param", "exp_avg", "exp_avg_sq")


@torch.no_grad()
def optimizer_state(optimizer: Any, model: dict[str, Any]) -> dict[str, Any]:
    """Sharded state for checkpoint.save(), float32 on the CPU, on the first data parallel rank; {} on the others.

    model: checkpoint.model_state() of the chunks. Reached by all ranks. 12 bytes a local parameter of host memory.
    """
    state: dict[str, Any] = {}
    sharded = {id(entry.data): entry for entry in nested_values(model)}
    for number, (shards, parameter) in enumerate(_parameters(optimizer)):
        group = shards.data_parallel_group
        mine = parameter in shards.model_param_gbuf_map
        held = shards._get_main_param_and_optimizer_states(parameter) if mine else {}
        for part in PARTS:
            whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if mine:
                piece = shards._get_model_param_range_map(parameter)["param"]
                whole[piece.start : piece.end] = held[part].view(-1)
            if group.size() > 1:
                dist.reduce(whole, group=group, group_dst=0)
            if group.rank() == 0:
                state[_name(part, number)] = _like(
                    sharded[id(parameter)], part, whole.view(parameter.shape).cpu()
                )
    return state


def empty_optimizer_state(optimizer: Any, model: dict[str, Any]) -> dict[str, Any]:
    """The same tensors on the same ranks, uninitialised, for checkpoint.load(): one of each group reads and holds 12 bytes a parameter, not all."""
    sharded = {id(entry.data): entry for entry in nested_values(model)}
    return {
        _name(part, number): _like(
            sharded[id(parameter)], part, torch.empty(parameter.shape, dtype=torch.float32)
        )
        for number, (shards, parameter) in enumerate(_parameters(optimizer))
        for part in PARTS
        if shards.data_parallel_group.rank() == 0
    }


@torch.no_grad()
def load_optimizer_state(optimizer: Any, state: dict[str, Any], step: int) -> None:
    """Fill every rank's pieces from the tensors that the first data parallel rank has loaded. step: Adam's count of steps done. Reached by all ranks."""
    for shards in _shards(optimizer):
        shards.init_state_fn(shards.optimizer, shards.config)
        for group in shards.optimizer.param_groups:
            group["step"] = step
    for number, (shards, parameter) in enumerate(_parameters(optimizer)):
        group, pieces = shards.data_parallel_group, {}
        piece = (
            shards._get_model_param_range_map(parameter)["param"]
            if parameter in shards.model_param_gbuf_map
            else None
        )
        for part in PARTS:
            if group.rank() == 0:
                whole = state[_name(part, number)].view(-1).to(parameter.device)
            else:
                whole = torch.empty(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if group.size() > 1:
                dist.broadcast(whole, group=group, group_src=0)
            if piece is not None:
                pieces[part] = whole[piece.start : piece.end].clone()
        if piece is not None:
            shards._set_main_param_and_optimizer_states(parameter, pieces)
    for shards in _shards(optimizer):
        if isinstance(
            shards.optimizer, torch.optim.Adam
        ):  # a GPU without Apex and TE: torch counts steps for each parameter
            for moments in shards.optimizer.state.values():
                moments["step"] = torch.tensor(float(step))


def _parameters(optimizer: Any) -> Iterator[tuple[Any, torch.nn.Parameter]]:
    """(distributed optimizer, parameter) in the order of the buffers, equal on all data parallel ranks."""
    for shards in _shards(optimizer):
        for buffer in shards.buffers:
            for parameter in buffer.param_index_map:
                yield shards, parameter


def _shards(optimizer: Any) -> list[Any]:
    """The DistributedOptimizers inside."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _name(part: str, number: int) -> str:
    return f"optimizer.{part}.{number}"


def _like(sharded: Any, part: str, data: torch.Tensor) -> Any:
    """A float32 tensor under the parameter's sharding (a ShardedTensor, or the factory of a gated fc1)."""
    dtype = {"dtype": torch.float32} if isinstance(sharded, ShardedTensor) else {}
    return replace(sharded, key=f"optimizer.{part}.{sharded.key}", data=data, **dtype)
