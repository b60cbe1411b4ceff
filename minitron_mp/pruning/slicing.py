"""Structured pruning of a sharded model, one weight at a time, by the tables of parameters and axes.

The checkpoint key of a tensor gives its dimensions. Its global offset gives the part of them that
this rank holds. So slicing depends neither on the model's classes nor on its layout:

    axis that is not split             an index_select
    axis that is split over tp         one all-to-all, because each rank has another number of kept
                                       units. No data is sent for heads if every query group keeps
                                       the same number of heads and no group is dropped
    layer                              a kept layer gets its new number in the key. Loading the
                                       result in another layout moves layers between ranks
    dimension without an axis          not sliced
"""

from __future__ import annotations

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from minitron_mp.artifacts.checkpoint import model_state
from minitron_mp.distributed.collectives import exchange_kept
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.models.axes import AXIS_OF_DIM, NO_LAYER, Rows
from minitron_mp.models.parameters import dims_of, layer_key, split_key
from minitron_mp.models.sharded_model import ShardedModel, unwrap
from minitron_mp.pruning.plan import PrunePlan


def prune(model: ShardedModel, plan: PrunePlan) -> dict[str, ShardedTensor]:
    """Return the student's sharded state, for save_checkpoint(). All ranks call it with one plan.

    The model cannot be used afterwards: the memory of each weight is freed as soon as its slice
    exists. So the peak memory beyond the model is the slice of one weight and the buffers of one
    exchange, and with merged heads also a copy of one linear_qkv. InputError names a parameter that
    the table does not have.
    """
    chunks = [unwrap(chunk) for chunk in model.chunks]
    if any(p.requires_grad and hasattr(p, "main_grad") for chunk in chunks for p in chunk.parameters()):
        raise InputError(
            "this model is wrapped for training, so gradient buffers share the memory of its weights; "
            "prune it before it is wrapped"
        )
    entries = [entry for state in model_state(chunks, model.world).values() for entry in state.values()]
    for entry in entries:
        # Detached from the parameter, so that only the entry references the memory.
        entry.data = entry.data.detach()
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.data.new_empty(0)
    student: dict[str, ShardedTensor] = {}
    entries.reverse()
    while entries:  # popped one by one, so that a sliced weight is referenced only by `student`
        entry = entries.pop()
        for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            sliced = slice_tensor(part, plan, model.world)
            if sliced is not None:
                student[f"{sliced.key}/{part.global_offset}"] = sliced
        del entry, part
    return student


@torch.no_grad()
def slice_tensor(tensor: ShardedTensor, plan: PrunePlan, world: World) -> ShardedTensor | None:
    """Return this rank's part of one parameter of the student, or None for a dropped layer.

    The replica number and the fragment of each dimension do not change.
    """
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
    for dim, dim_name in enumerate(dims):
        start, size = tensor.global_offset[dim], tensor.local_shape[dim]
        data = _slice_dim(data, dim, start, dim_name, NO_LAYER if layer is None else layer, plan, world)
        fragments.append((dim, start // size, tensor.axis_fragmentations[dim]))
    return ShardedTensor.from_rank_offsets(
        name if layer is None else layer_key(plan.layers.index(layer), name),
        data.contiguous(),
        *fragments,
        replica_id=tensor.replica_id,
        allow_shape_mismatch=tensor.allow_shape_mismatch,
    )


def _slice_dim(
    data: Tensor, dim: int, start: int, name: str, layer: int, plan: PrunePlan, world: World
) -> Tensor:
    """Slice one dimension of this rank's part of a weight.

    name: the dimension's name in the table of parameters. start: first global row on this rank.
    """
    axis = AXIS_OF_DIM.get(name)
    if axis is None:
        return data
    weight_dim = axis.dims[name]
    rows = weight_dim.rows(plan.units(axis, layer), plan.teacher, layer)
    if not axis.split_over_tp:
        return data.index_select(dim, torch.from_numpy(rows).to(data.device))
    if weight_dim.merged_rows is not None and axis.name in plan.merge:
        pairs = plan.merge[axis.name][layer]
        data = merge_rows(data, start, pairs, weight_dim.merged_rows, plan.teacher, layer)
    if weight_dim.copies(plan.teacher) > 1:
        # Each copy is a separate tensor under the same key; the second starts where the first ends.
        every_unit = np.arange(axis.num_units(plan.teacher, layer))
        start %= len(weight_dim.rows(every_unit, plan.teacher, layer))
    return exchange_kept(data, dim, torch.from_numpy(rows), start, world.groups.tp)


def merge_rows(
    data: Tensor, start: int, pairs: list[tuple[int, int]], rows_of: Rows, teacher: Arch, layer: int
) -> Tensor:
    """Return data [rows, ...] with kept units replaced by kept + (kept - pruned).

    2407.14679 section 2.3. pairs: (kept, pruned), both of one group and therefore on one rank.
    start: global row of data[0]. The sum is computed in float32 and rounded once. In bf16 the
    difference would also be rounded before the addition.
    """
    if not pairs:
        return data
    kept, pruned = (torch.from_numpy(rows_of(units, teacher, layer)) for units in np.array(pairs, int).T)
    is_here = (kept >= start) & (kept < start + data.shape[0])
    kept, pruned = ((rows[is_here] - start).to(data.device) for rows in (kept, pruned))
    return data.index_copy(0, kept, (2 * data[kept].float() - data[pruned].float()).to(data.dtype))
