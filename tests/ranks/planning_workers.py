"""Worker functions for the planning tests. They emulate any rank of any layout on one process.

Process groups use torch's 'fake' backend, whose collectives return without communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from cases import CORRECT
from model_workers import manifest
from pool import without_group
from torch.testing._internal.distributed.fake_pg import FakeStore

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.training import TrainingConfig
from minitron_mp.distributed.world import World, build_groups, leave_job
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.training.loop import take_step
from minitron_mp.training.options import RunOptions
from minitron_mp.training.run import TrainingRun

META = torch.device("meta")


@contextmanager
def alone(p: ParallelConfig, rank: int = 0, dp: int = 1) -> Iterator[World]:
    """The world of one rank of a layout. Nothing that it receives means anything; shapes do."""
    dist.init_process_group("fake", rank=rank, world_size=p.model_ranks * dp, store=FakeStore())
    try:
        yield build_groups(p, torch.device("cpu"), 1)
    finally:
        leave_job(torch.device("cpu"))


def parameters(cases: list[tuple[Arch, ParallelConfig]]) -> list[list[tuple[int, int]]]:
    """Count the parameters that Megatron-Core makes, for each case and pipeline stage.

    Returns those of the first and of the last tensor parallel rank. Allocates no memory.
    """
    found = []
    with without_group():
        for arch, p in cases:
            found.append([])
            for stage in range(p.pp):
                counts = []
                for tp_rank in (0, p.tp - 1):
                    with (
                        alone(p, stage * p.tp * p.cp + tp_rank) as world,
                        META,
                        patch("torch.cuda.current_device", lambda: META),
                    ):
                        assert (world.groups.pp.rank(), world.groups.tp.rank()) == (stage, tp_rank)
                        model = build_model(
                            arch,
                            dataclasses.replace(world, device=META),
                            ModelOptions(
                                precision="bf16",
                                sequence_length=128,
                            ),
                        )
                        weights = [weight for chunk in model.chunks for weight in chunk.parameters()]
                        assert all(weight.is_meta for weight in weights)
                        counts.append(sum(weight.numel() for weight in weights))
                found[-1].append(tuple(counts))
    return found


def kept(cases: list[tuple[Arch, ParallelConfig, str, bool, int, int]]) -> list[int]:
    """Return the bytes that autograd holds after the forward pass, without the weights.

    A case is (arch, layout, precision, recompute, sequence length, microbatch).
    """
    found = []
    with without_group():
        for arch, p, precision, recompute, sequence, batch in cases:
            with alone(p) as world:
                training = TrainingConfig(recompute=recompute)
                (model,) = build_model(
                    arch,
                    world,
                    ModelOptions(
                        precision=precision,
                        sequence_length=sequence,
                        training=training,
                        random_weights=True,
                    ),
                ).chunks
                weights, held = {weight.untyped_storage().data_ptr() for weight in model.parameters()}, {}

                def pack(tensor: torch.Tensor, weights: set = weights, held: dict = held) -> torch.Tensor:
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in weights:
                        held[storage.data_ptr()] = (
                            storage.nbytes(),
                            tensor,
                        )  # kept, or its address would be used again
                    return tensor

                tokens = torch.zeros(batch, sequence // p.cp, dtype=torch.int64)
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    model(tokens, tokens, None)
                found.append(sum(num_bytes for num_bytes, _ in held.values()))
    return found


def in_flight(arch: Arch, cases: list[tuple[ParallelConfig, int]]) -> list[list[int]]:
    """Return the largest number of layers in flight on each stage, in Megatron's schedule.

    A layer is in flight between its forward and its backward pass. A case is (layout, number of
    microbatches).
    """
    found = []
    with without_group():
        for p, microbatches in cases:
            found.append([])
            for stage in range(p.pp):
                with alone(p, stage) as world:
                    training, now, peak = make_run(arch, world, microbatches, "fp32"), [0], [0]

                    def forward(*_: Any, now: list = now, peak: list = peak) -> None:
                        now[0] += 1
                        peak[0] = max(peak[0], now[0])

                    def backward(*_: Any, now: list = now) -> None:
                        now[0] -= 1

                    for chunk in training.model.chunks:
                        for layer in chunk.module.decoder.layers:
                            layer.register_forward_hook(forward)
                            layer.mlp.linear_fc1.weight.register_post_accumulate_grad_hook(backward)
                    training.forward_backward(batches(arch, microbatches))
                    assert now == [0]
                    found[-1].append(peak[0])
    return found


def training_bytes(arch: Arch, cases: list[tuple[ParallelConfig, int, str]]) -> list[dict[str, int]]:
    """Return the bytes of weights, gradients and optimizer state on the first rank after a step.

    A case is (layout, data parallel size, precision).
    """
    found = []
    with without_group():
        for p, dp, precision in cases:
            with alone(p, dp=dp) as world:
                training = make_run(arch, world, 1, precision)
                take_step(training, batches(arch, 1))
                optimizer = training.trainable.optimizer
                if hasattr(optimizer, "chained_optimizers"):
                    optimizer = optimizer.chained_optimizers[0]
                weights = {
                    weight.data_ptr() for model in training.model.chunks for weight in model.parameters()
                }
                state = [
                    tensor for values in optimizer.optimizer.state.values() for tensor in values.values()
                ]
                state += [
                    weight
                    for group in optimizer.optimizer.param_groups
                    for weight in group["params"]
                    if precision == "bf16"
                ]
                assert weights
                found.append(
                    {
                        "weights": sum(
                            weight.nbytes for model in training.model.chunks for weight in model.parameters()
                        ),
                        "gradients (float32)": sum(
                            weight.main_grad.nbytes
                            for model in training.model.chunks
                            for weight in model.parameters()
                        ),
                        "optimizer state": sum(tensor.nbytes for tensor in state),
                    }
                )
    return found


def make_run(arch: Arch, world: World, microbatches: int, precision: str) -> TrainingRun:
    settings = CORRECT.model_copy(update={"micro_batch_size": 1, "global_batch_size": microbatches})
    model = build_model(
        arch,
        world,
        ModelOptions(precision=precision, sequence_length=8, training=settings, random_weights=True),
    )
    return TrainingRun(model, None, settings, RunOptions(None, manifest("correct", arch)))


def batches(arch: Arch, count: int) -> list[dict[str, torch.Tensor]]:
    tokens = torch.arange(8)[None] % arch.vocab_size
    return [
        {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(1, 8), "position_ids": tokens}
        for _ in range(count)
    ]


def benchmark(folder: Path, program: str, arguments: list[str]) -> str:
    """What one of benchmarks/ prints, run in this process."""
    import contextlib
    import io
    import runpy
    import sys

    out = io.StringIO()
    with (
        without_group(),
        patch.object(sys, "argv", [program, *arguments]),
        patch.object(sys, "path", [str(folder), *sys.path]),
        contextlib.redirect_stdout(out),
    ):
        runpy.run_path(str(folder / program), run_name="__main__")
    return out.getvalue()
