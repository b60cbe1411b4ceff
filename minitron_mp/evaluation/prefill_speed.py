"""How fast models read text: forward passes in the job's layout, timed. A small measurement of inference, not a serving benchmark."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel

from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.schedule import run_schedule
from minitron_mp.distributed.world import World

REPEATS = 3
"""Timed passes of a model and shape, where the time allows for them; always one."""


class Prefill(BaseModel):
    """Forward passes of one model over `samples` sequences a pass and copy of the model, to the hidden states after the final norm.

    The output layer is left out: prefill needs it for one token of a sample. seconds: the median of `repeats` passes, each on its slowest
    rank. tokens_per_s: over all copies, which work side by side.
    """

    samples: int
    sequence_length: int
    repeats: int
    seconds: float
    spread: float
    """Slowest less fastest pass, as a share of seconds: how much the machine was disturbed; 0 for one pass."""
    tokens_per_s: float


class Speed(BaseModel):
    """models: name -> one Prefill a shape, the same shapes for all. device: of a rank. ranks = tp x pp x cp x copies of the model."""

    device: str
    ranks: int
    copies: int
    models: dict[str, list[Prefill]]


def measure(
    models: Mapping[str, list[Any]],
    kinds: Mapping[str, Hashable],
    world: World,
    *,
    sequence_length: int,
    micro_batch_size: int,
    vocab_size: int,
    budget_s: float,
) -> Speed:
    """Speed of each model on a single sample, and on a batch where that is more; the same on every rank, reached by all ranks.

    kinds: name -> architecture and precision. Models of one kind are as fast: the first of them is measured, or noise would tell them apart.
    A batch is micro_batch_size samples, and as many of them as the pipeline has stages. The models must have run microbatches of this size
    just before: they are warm for it, and a pass to warm up is made for the other size only. The models take turns, so that a machine that
    slows down does so for all of them; budget_s: no further round begins after it.
    """
    p, first = world.parallel, {kind: name for name, kind in reversed(kinds.items())}
    shapes = list(
        dict.fromkeys([(1, p.interleaved), (micro_batch_size, p.pp)])
    )  # samples of a microbatch, microbatches: vpp wants pp of them
    work = {
        (name, shape): [batch_of(shape[0], sequence_length, vocab_size)] * shape[1]
        for name in kinds
        if first[kinds[name]] == name
        for shape in shapes
    }
    times: dict[tuple[str, tuple[int, int]], list[float]] = {key: [] for key in work}
    budget_s, spent = _slowest(budget_s, world), 0.0
    for (name, shape), batches in work.items():
        for chunk in models[name]:
            chunk.eval()
        if shape[0] != micro_batch_size:
            spent += timed(models[name], world, batches)
    # Times are the slowest rank's, known to all, so that every rank leaves the loop after the same round.
    for repeat in range(REPEATS):
        if repeat and spent > budget_s:
            break
        for (name, shape), batches in work.items():
            times[name, shape].append(timed(models[name], world, batches))
            spent += times[name, shape][-1]
    copies = world.groups.dp.size()
    found = {
        name: [_prefill(shape, sequence_length, copies, times[first[kind], shape]) for shape in shapes]
        for name, kind in kinds.items()
    }
    return Speed(device=device_name(world), ranks=world.size, copies=copies, models=found)


def _prefill(shape: tuple[int, int], length: int, copies: int, times: list[float]) -> Prefill:
    samples, seconds = shape[0] * shape[1], statistics.median(times)
    rate = samples * length * copies / seconds
    spread = (max(times) - min(times)) / seconds
    return Prefill(
        samples=samples,
        sequence_length=length,
        repeats=len(times),
        seconds=seconds,
        spread=spread,
        tokens_per_s=rate,
    )


def timed(chunks: list[Any], world: World, batches: list[Batch]) -> float:
    """Seconds of one pass on the slowest rank."""
    _wait(world)
    dist.barrier()
    start = time.perf_counter()
    run_schedule(chunks, batches, world, None)
    _wait(world)
    return _slowest(time.perf_counter() - start, world)


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _slowest(seconds: float, world: World) -> float:
    value = torch.tensor(seconds, dtype=torch.float64, device=world.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def batch_of(size: int, length: int, vocab_size: int) -> Batch:
    """The time does not depend on which tokens they are."""
    tokens = torch.arange(size * length).view(size, length) % vocab_size
    positions = torch.arange(length).expand(size, length).contiguous()
    return {
        "tokens": tokens,
        "labels": tokens,
        "position_ids": positions,
        "loss_mask": torch.ones(size, length),
    }


def device_name(world: World) -> str:
    """What a rank computes on, for people."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.is_file()
        else []
    )
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' * (threads > 1)} a rank"
