"""Structured pruning of a sharded model: one loop over its parameters, one weight at a time.

The checkpoint key of a tensor gives its layer and its dimensions (models.parameters), and its global offset the part of them
that this rank holds. So slicing needs neither the model's classes nor its layout:

    hidden               whole on every rank: an index_select
    ffn, gate_up         kept neurons are spread unevenly over tensor parallel ranks: one all-to-all evens them out
    heads, qkv           as many heads go from every query group, so they stay on their rank; kept groups may be spread
                         unevenly: then, as above, one all-to-all
    layer                a kept layer gets its new number in the key; the result is written under it, and loading it at any
                         other layout is what moves layers between ranks
    vocab, head_width    whole
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from minitron_mp.artifacts.checkpoint import model_state
from minitron_mp.distributed.collectives import exchange_kept
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.models.arch import expand, query_slots, slot_rows
from minitron_mp.models.build import unwrap
from minitron_mp.models.parameters import dims_of, layer_key, split_key
from minitron_mp.pruning.plan import PrunePlan


def prune(chunks: list[Any], plan: PrunePlan, world: World) -> dict[str, ShardedTensor]:
    """The student's sharded state, for checkpoint.save(); reached by all ranks with the same plan.

    Consumes the model: each weight's memory goes as soon as its slice is there, so the peak beyond the model is one weight's
    slice and the buffers of one exchange; where heads are merged, also a copy of one linear_qkv. InputError names a parameter that the tables lack.
    """
    chunks = [unwrap(chunk) for chunk in chunks]
    if sum(p.requires_grad and hasattr(p, "main_grad") for chunk in chunks for p in chunk.parameters()):
        raise InputError(
            "this model has gradient buffers over its weights; prune it before it is wrapped for training"
        )
    entries = [entry for state in model_state(chunks, world).values() for entry in state.values()]
    for entry in entries:
        entry.data = (
            entry.data.detach()
        )  # a parameter so far; the entry is to be the only one that holds its memory
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.data.new_empty(0)
    student: dict[str, ShardedTensor] = {}
    entries.reverse()
    while entries:  # popped one by one, so that nothing but `student` holds on to a weight that is done
        entry = entries.pop()
        for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            sliced = slice_tensor(part, plan, world)
            if sliced is not None:
                student[f"{sliced.key}/{part.global_offset}"] = sliced
        del entry, part
    return student


@torch.no_grad()
def slice_tensor(tensor: ShardedTensor, plan: PrunePlan, world: World) -> ShardedTensor | None:
    """This rank's part of one parameter of the student, or None when its layer goes. Same replica, same fragment of each axis."""
    dims = dims_of(tensor.key)
    if dims is None:
        raise InputError(
            f"{tensor.key} {tuple(tensor.global_shape)} is not in the tables of parameters; "
            "add its dimensions to PARAMETERS in models/blocks/dense.py"
        )
    layer, name = split_key(tensor.key)
    if layer is not None and layer not in plan.layers:
        return None
    data, fragments = tensor.data, []
    for dim, axis in enumerate(dims):
        start, size = tensor.global_offset[dim], tensor.local_shape[dim]
        data = _slice_axis(data, dim, axis, start, plan, layer, world)
        fragments.append((dim, start // size, tensor.axis_fragmentations[dim]))
    return ShardedTensor.from_rank_offsets(
        name if layer is None else layer_key(plan.layers.index(layer), name),
        data.contiguous(),
        *fragments,
        replica_id=tensor.replica_id,
        allow_shape_mismatch=tensor.allow_shape_mismatch,
    )


def _slice_axis(
    data: Tensor, dim: int, axis: str, start: int, plan: PrunePlan, layer: int | None, world: World
) -> Tensor:
    """data: this rank's part of a weight, which holds the axis from global position `start` on."""
    if axis in ("vocab", "head_width"):
        return data
    if axis == "hidden":
        return data.index_select(dim, torch.from_numpy(plan.keep(axis)).to(data.device))
    if axis == "qkv":
        assert layer is not None
        data = _merge_heads(data, start, plan, layer)
    if axis == "gate_up":
        # Gate and up come as two tensors of one key; the up half starts at f.
        axis, start = "ffn", start % plan.teacher.ffn_hidden_size
    keep = torch.from_numpy(expand(axis, plan.keep(axis, layer), plan.teacher))
    return exchange_kept(data, dim, keep, start, world.groups.tp)


def _merge_heads(rows: Tensor, start: int, plan: PrunePlan, layer: int) -> Tensor:
    """linear_qkv's rows with the residual of pruned queries in kept ones: head + (head - pruned head), as plan.merge pairs them.

    2407.14679 section 2.3. Both of a pair are in one query group, and so on one rank. The sum is made in float32 and rounded
    once; in bf16 the difference would be rounded before it is added, too.
    """
    if not plan.merge:
        return rows
    pairs = np.array(plan.merge[plan.layers.index(layer)], int).reshape(-1, 2)
    kept, pruned = (
        torch.from_numpy(slot_rows(query_slots(heads, plan.teacher), plan.teacher)) for heads in pairs.T
    )
    mine = (kept >= start) & (kept < start + rows.shape[0])
    kept, pruned = ((at[mine] - start).to(rows.device) for at in (kept, pruned))
    return rows.index_copy(0, kept, (2 * rows[kept].float() - rows[pruned].float()).to(rows.dtype))
