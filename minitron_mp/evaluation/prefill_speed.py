"""Prefill speed of models: timed forward passes in the parallel layout of the job.

A small measurement, not a serving benchmark.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import BaseModel

from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.process_groups import host_barrier
from minitron_mp.distributed.world import World
from minitron_mp.models.arch import Arch
from minitron_mp.models.sharded_model import ShardedModel

REPEATS = 3
"""Timed passes of a model and shape. The time budget may reduce them to one."""


Kind = tuple[Arch, str]
"""Architecture and precision."""

Shape = tuple[int, int]
"""Samples per microbatch, microbatches per pass."""


class Prefill(BaseModel):
    """Forward passes of one model over `samples` sequences per pass and model copy.

    They end at the hidden states after the final norm. The output layer is left out, because
    prefill needs it for one token of a sample.
    """

    samples: int
    sequence_length: int
    repeats: int
    """Number of timed passes."""
    seconds: float
    """Median over the passes. The time of a pass is the time of the slowest rank."""
    spread: float
    """(slowest - fastest pass) / seconds. A large value means other load on the machine. 0 for one
    pass.
    """
    tokens_per_s: float
    """Sum over all copies of the model, which run at the same time."""


class Speed(BaseModel):
    """Prefill speed of several models. ranks = tp x pp x cp x copies of the model."""

    device: str
    """Device of one rank."""
    ranks: int
    copies: int
    models: dict[str, list[Prefill]]
    """Name -> one Prefill per shape, the same shapes for all models."""


def measure(models: Mapping[str, ShardedModel], *, micro_batch_size: int, budget_s: float) -> Speed:
    """Measure the speed of each model on one sample and on a batch.

    The result is equal on every rank. All ranks must call this. A batch is micro_batch_size samples
    for each pipeline stage. Models of the same architecture and precision run at the same speed, so
    only the first of them is measured: noise would make them differ. Each model must have run
    microbatches of this size just before, as a warm-up. Only the one-sample shape gets a warm-up
    pass. The models take turns, so that a slow phase of the machine affects all of them. No round
    begins after budget_s seconds.
    """
    first_model = next(iter(models.values()))
    world, length = first_model.world, first_model.sequence_length
    parallel = world.parallel
    # (samples per microbatch, microbatches): the interleaved schedule needs pp microbatches
    shapes = list(dict.fromkeys([(1, parallel.interleaved), (micro_batch_size, parallel.pp)]))
    measured: dict[Kind, ShardedModel] = {}
    for model in models.values():
        measured.setdefault(_kind(model), model.eval())
    batches = {
        (kind, shape): [batch_of(shape[0], length, model.arch.vocab_size)] * shape[1]
        for kind, model in measured.items()
        for shape in shapes
    }
    times: dict[tuple[Kind, Shape], list[float]] = {key: [] for key in batches}
    budget_s, spent_s = _slowest(budget_s, world), 0.0
    for (kind, shape), passes in batches.items():
        if shape[0] != micro_batch_size:
            spent_s += timed(measured[kind], passes)
    # Each time is the time of the slowest rank, equal on all ranks. So all ranks end the loop after
    # the same round.
    for repeat in range(REPEATS):
        if repeat and spent_s > budget_s:
            break
        for (kind, shape), passes in batches.items():
            times[kind, shape].append(timed(measured[kind], passes))
            spent_s += times[kind, shape][-1]
    copies = world.groups.dp.size()
    prefills = {
        name: [_prefill(shape, length, copies, times[_kind(model), shape]) for shape in shapes]
        for name, model in models.items()
    }
    return Speed(device=device_name(world), ranks=world.size, copies=copies, models=prefills)


def _kind(model: ShardedModel) -> Kind:
    return model.arch, model.precision


def _prefill(shape: Shape, length: int, copies: int, times: list[float]) -> Prefill:
    samples = shape[0] * shape[1]
    seconds = statistics.median(times)
    return Prefill(
        samples=samples,
        sequence_length=length,
        repeats=len(times),
        seconds=seconds,
        spread=(max(times) - min(times)) / seconds,
        tokens_per_s=samples * length * copies / seconds,
    )


def timed(model: ShardedModel, batches: list[Batch]) -> float:
    """Run one forward pass and return its seconds on the slowest rank. All ranks must call this."""
    world = model.world
    _synchronize(world)
    host_barrier()
    start = time.perf_counter()
    model.forward(batches)
    _synchronize(world)
    return _slowest(time.perf_counter() - start, world)


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _slowest(seconds: float, world: World) -> float:
    value = torch.tensor(seconds, dtype=torch.float64, device=world.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def batch_of(size: int, length: int, vocab_size: int) -> Batch:
    """Return a microbatch of arbitrary tokens, which do not change the time."""
    tokens = torch.arange(size * length).view(size, length) % vocab_size
    return {
        "tokens": tokens,
        "labels": tokens,
        "position_ids": torch.arange(length).expand(size, length).contiguous(),
        "loss_mask": torch.ones(size, length),
    }


def device_name(world: World) -> str:
    """Return the name of a rank's device, for reports."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    threads = torch.get_num_threads()
    unit = "thread" if threads == 1 else "threads"
    return f"{_cpu_name()}, {threads} {unit} per rank"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
