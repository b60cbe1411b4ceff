"""Run microbatches through Megatron's pipeline schedules. No other file calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.collectives import context_parallel_slice
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError

OnOutput = Callable[[Tensor, Batch], object]
"""(hidden states after the final norm, local batch) -> result, on the last stage."""


NO_TIMER = nullcontext()
"""The default of timer."""


def ignore_batch(batch: Batch) -> None:
    """Do nothing; the default of on_batch."""


def run_schedule(
    chunks: list[Any],
    batches: Sequence[Batch],
    world: World,
    on_output: OnOutput | None,
    *,
    train: bool = False,
    on_batch: Callable[[Batch], None] = ignore_batch,
    timer: AbstractContextManager[None] = NO_TIMER,
) -> list[Any]:
    """Run microbatches through the chunks and return the results of on_output.

    Reached by all ranks, with the same number of batches on each. Without train the result is a
    list on the last stage, and [] on the other stages.

    batches: microbatches of this data-parallel rank with complete sequences; tokens, labels and
        position_ids int64 [b, s], loss_mask float32 [b, s].
    on_output(hidden [s', b, h], local batch [s/cp, b]): runs on the last stage for each microbatch
        in order. s' is s/cp, or s/cp/tp under sequence parallelism.
    on_batch(local batch): runs on every stage before each chunk's forward pass.
    timer: context of each chunk's forward pass.
    train: on_output must return Megatron's (loss sum, number of tokens, report). Gradients are
        accumulated and finalized.
    """
    p = world.parallel
    b, s = batches[0]["tokens"].shape
    if p.vpp and len(batches) % p.pp:
        raise InputError(
            f"the interleaved schedule (vpp) needs a multiple of pp {p.pp} microbatches per step and data "
            f"parallel rank, given {len(batches)}; change global_batch_size, or drop vpp"
        )
    forward_backward = get_forward_backward_func()
    with torch.set_grad_enabled(train):
        return forward_backward(
            forward_step_func=partial(
                _forward_step, world=world, on_output=on_output, on_batch=on_batch, timer=timer
            ),
            data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            seq_length=s,
            micro_batch_size=b,
            forward_only=not train,
            collect_non_loss_data=not train,
        )


def local_batch(batch: Batch, world: World) -> Batch:
    """Return this context-parallel rank's part of a batch, on its device.

    labels and loss_mask are transposed to [s/cp, b]. documents and rows stay complete. Further keys
    are not changed.
    """
    local: dict[str, Any] = {}
    for key, value in cast(dict[str, Any], batch).items():
        if key in ("tokens", "labels", "position_ids", "loss_mask"):
            value = context_parallel_slice(on_device(value, world.device), 1, world.groups.cp)
        elif key in ("documents", "rows"):
            value = on_device(value, world.device)
        local[key] = value.transpose(0, 1) if key in ("labels", "loss_mask") else value
    return cast(Batch, local)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on the device, without waiting for the kernels of earlier work.

    A copy to a GPU is asynchronous only from pinned memory. torch keeps pinned memory for reuse, so
    pinning costs a copy on the host.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _forward_step(
    iterator: Iterator[Batch],
    model: Any,
    *,
    world: World,
    on_output: OnOutput | None,
    on_batch: Callable,
    timer: AbstractContextManager[None],
) -> tuple[Tensor, Callable]:
    batch = local_batch(next(iterator), world)
    on_batch(batch)
    with timer:
        output = model(batch["tokens"], batch["position_ids"], batch.get("documents"))

    def finish(output: Tensor, non_loss_data: bool = False) -> object:
        return on_output(output.transpose(0, 1), batch) if on_output else None

    return output, finish
