"""What the tests of non-finite gradients run on the ranks of a pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cases import Layout, settings
from model_workers import joined, load
from torch import Tensor
from training_workers import Runner, small_buckets

from minitron_mp.artifacts.checkpoint import model_state
from minitron_mp.artifacts.optimizer_state import sharded_by_parameter
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.distillation.layer_pairs import LayerPairs
from minitron_mp.distillation.teacher import ColocatedTeacher
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.training import loop, run
from minitron_mp.training.optimizer import TrainableModel
from minitron_mp.training.run import TrainingRun


@contextmanager
def on_new_run(prepare: Callable[[TrainingRun], None]) -> Iterator[None]:
    """Call prepare() with each run that train_one() makes."""

    def make(*arguments: Any) -> TrainingRun:
        made = TrainingRun(*arguments)
        prepare(made)
        return made

    with patch.object(loop, "TrainingRun", make):
        yield


def spoil(parameter_name: str, rank: int, steps: list[int]) -> Callable[[TrainingRun], None]:
    """Return the function that makes one gradient of one rank NaN in these steps (from 0)."""

    def prepare(made: TrainingRun) -> None:
        if made.world.rank != rank:
            return
        chunks = [chunk.module for chunk in made.model.chunks]
        names = sharded_by_parameter(model_state(chunks, made.world))
        (parameter,) = [
            parameter
            for chunk in chunks
            for parameter in chunk.parameters()
            if names[id(parameter)].key == parameter_name
        ]

        def hook(gradient: Tensor) -> Tensor:
            return gradient * torch.nan if made.steps_done in steps else gradient

        parameter.register_hook(hook)

    return prepare


@contextmanager
def lost_updates(steps: list[int]) -> Iterator[None]:
    """Leave out the updates of these steps (from 0), as if they had never been."""
    usual = TrainableModel.apply

    def apply(trainable: TrainableModel, norm: float) -> None:
        if trainable.schedule.num_steps - 1 not in steps:
            usual(trainable, norm)

    with patch.object(TrainableModel, "apply", apply):
        yield


def skipped_step(
    layout: Layout,
    arch: Arch,
    teacher: Path,
    student_arch: Arch,
    student: Path,
    output: Path,
    parameter_name: str,
    rank: int,
    changes: dict[str, Any],
) -> dict[str, Any]:
    """Train with a NaN in step 2 on one rank: uninterrupted, resumed after it, and to the end of a run.

    Also train without the update of that step.
    """
    chosen = settings(layout).model_copy(update={"checkpoint_interval": 1, **changes})
    with joined(layout) as world, small_buckets():
        signals = ColocatedTeacher(load(arch, teacher, world))
        runner = Runner(world, signals, chosen)
        lines: list[str] = []
        with patch.object(run, "say", lines.append), on_new_run(spoil(parameter_name, rank, [1])):
            whole = runner(student_arch, student, output / "whole")
            first = runner(student_arch, student, output / "stopped", stop_after=2)
            rest = runner(student_arch, None, output / "stopped")
        with lost_updates([1]):
            expected = runner(student_arch, student, output / "expected")
        return {
            "lines": lines,
            "whole": whole.metrics,
            "resumed": first.metrics + rest.metrics,
            "expected": expected.metrics,
            "resumed bitwise": all(map(torch.equal, whole.weights, rest.weights)),
            "expected bitwise": all(map(torch.equal, whole.weights, expected.weights)),
            "ended": _ended(runner, student_arch, student, output / "ended", parameter_name, rank),
            "first step": _first_step_skipped(
                world, signals, chosen, student_arch, student, output, parameter_name, rank
            ),
        }


def _ended(runner: Runner, arch: Arch, student: Path, output: Path, parameter_name: str, rank: int) -> str:
    """Return the error of a run in which every step from the second on has a NaN."""
    limited = Runner(runner.world, runner.teacher, runner.settings.model_copy(update={"max_skipped": 1}))
    with on_new_run(spoil(parameter_name, rank, [1, 2, 3])):
        try:
            limited(arch, student, output)
        except InputError as error:
            return str(error)
    return ""


def _first_step_skipped(
    world: World,
    teacher: ColocatedTeacher,
    chosen: DistillConfig,
    arch: Arch,
    student: Path,
    output: Path,
    parameter_name: str,
    rank: int,
) -> bool:
    """Return whether a resume before the first update is bitwise identical."""
    runner = Runner(world, teacher, chosen)
    with on_new_run(spoil(parameter_name, rank, [0])):
        whole = runner(arch, student, output / "first whole")
        runner(arch, student, output / "first stopped", stop_after=1)
        rest = runner(arch, None, output / "first stopped")
    return all(map(torch.equal, whole.weights, rest.weights))


def teacher_is_not_finite(
    layout: Layout, arch: Arch, teacher: Path, student_arch: Arch, student: Path, output: Path
) -> list[str]:
    """Return the log lines of a run whose teacher is NaN in the first step, on the last rank alone."""
    with joined(layout) as world:
        signals = ColocatedTeacher(load(arch, teacher, world))
        lines: list[str] = []
        usual = signals.signals

        def spoiled(batches: Any, step: int) -> Any:
            found = usual(batches, step)
            if step == 0 and world.rank == world.size - 1:
                found[0].hidden[0] = torch.nan
            return found

        with patch.object(run, "say", lines.append), patch.object(signals, "signals", spoiled):
            Runner(world, signals, settings(layout))(student_arch, student, output)
        return lines


def skipped_step_with_hidden_states(
    layout: Layout,
    arch: Arch,
    teacher: Path,
    student_arch: Arch,
    student: Path,
    channels: list[int],
    chosen: DistillConfig,
    output: Path,
) -> dict[str, Any]:
    """Match hidden states with a NaN in step 2: uninterrupted, and stopped after each step.

    Returns whether both runs are equal, and alpha and the projection after each step.
    """
    chosen = chosen.model_copy(update={"checkpoint_interval": 1})
    with joined(layout) as world:
        pairs = LayerPairs(chosen.states, student_arch, arch, tuple(channels))
        signals = ColocatedTeacher(load(arch, teacher, world), pairs=pairs)
        runs: list[TrainingRun] = []
        spoiled = spoil("decoder.layers.0.mlp.linear_fc2.weight", 0, [1])

        def prepare(made: TrainingRun) -> None:
            runs.append(made)
            spoiled(made)

        runner = Runner(world, signals, chosen)
        with on_new_run(prepare):
            whole = runner(student_arch, student, output / "whole")
            parts = [
                runner(student_arch, student if number == 0 else None, output / "parts", stop_after=1)
                for number in range(chosen.steps)
            ]
        states = [(made.hidden_states.alpha.item(), made.hidden_states.projection.weight) for made in runs]
        return {
            "bitwise": all(map(torch.equal, whole.weights, parts[-1].weights)),
            "alpha": [alpha for alpha, _ in states],
            "projection": [weight.detach().clone() for _, weight in states],
        }
