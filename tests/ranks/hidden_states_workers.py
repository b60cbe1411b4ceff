"""Worker functions for the tests of losses on hidden states; they run on the ranks of a pool.

See also training_workers.py and teacher_stream_workers.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cases import RESUME_AT, SEQUENCE_LENGTH, Layout, make_samples, microbatches
from model_workers import count_hooks, joined, load
from teacher_stream_workers import joined_roles, make_link
from torch import Tensor
from training_workers import Runner, copy_once

from minitron_mp.config.distillation import DistillConfig
from minitron_mp.distillation.layer_pairs import LayerPairs
from minitron_mp.distillation.receiver import Receiver
from minitron_mp.distillation.serve import ServedTeacher, serve_signals
from minitron_mp.distillation.stream import Senders
from minitron_mp.distillation.stream_layout import StreamShape
from minitron_mp.distillation.teacher import ColocatedTeacher, RemoteTeacher
from minitron_mp.distillation.teacher_head import load_head
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.training import loop
from minitron_mp.training.metrics import StepMetrics

Student = tuple[Arch, Path, list[int]]
"""Architecture, checkpoint, kept channels."""


def train_all(
    layout: Layout,
    arch: Arch,
    teacher: Path,
    runs: dict[str, tuple[Student, DistillConfig, Path | None]],
    output: Path,
) -> dict[str, Any]:
    """Run several (student, settings, checkpoints to resume from) cases.

    Returns name -> (metrics of rank 0, this rank's projection at the end).
    """
    found = {}
    with joined(layout) as world:
        for name, ((student_arch, student, channels), settings, stopped) in runs.items():
            signals = ColocatedTeacher(
                load(arch, teacher, world),
                pairs=LayerPairs(settings.states, student_arch, arch, tuple(channels)),
            )
            if stopped:
                copy_once(stopped, output / name)
            signals.model.forward(
                microbatches(make_samples(arch, 9, 2), 1, 0, 1)
            )  # somebody measures the teacher first
            kept: list[Any] = []
            with watched(kept):
                metrics = Runner(world, signals, settings)(
                    student_arch, None if stopped else student, output / name
                ).metrics
            assert count_hooks(kept[0].model.chunks) == 0, "hooks on the student are left"
            projection = kept[0].hidden_states.projection
            found[name] = metrics, None if projection is None else projection.weight.detach().clone()
    return found


class watched:
    """Keeps the Runs that train_one() makes."""

    def __init__(self, kept: list[Any]):
        self.kept, self.usual = kept, loop.TrainingRun

    def __enter__(self) -> None:
        def make(*arguments: Any, **options: Any) -> Any:
            self.kept.append(self.usual(*arguments, **options))
            return self.kept[-1]

        loop.TrainingRun = make

    def __exit__(self, *_: Any) -> None:
        loop.TrainingRun = self.usual


def train_remote(
    student: Layout,
    teacher: Layout,
    window: int,
    arch: Arch,
    weights: Path,
    model: Student,
    settings: DistillConfig,
    output: Path,
) -> list[StepMetrics]:
    """Run the first RESUME_AT steps of a case of train_all with a remote teacher.

    Returns the metrics of the student's rank 0, [] elsewhere.
    """
    roles = {"student": (student.ranks, student.parallel), "teacher": (teacher.ranks, teacher.parallel)}
    per_step = settings.global_batch_size // settings.micro_batch_size
    shape = StreamShape("hidden", SEQUENCE_LENGTH, settings.micro_batch_size, arch.hidden_size, torch.float32)
    student_arch, folder, channels = model
    pairs, ids = LayerPairs(settings.states, student_arch, arch, tuple(channels)), range(RESUME_AT * per_step)

    def batch_of(id: int) -> dict[str, Tensor]:
        samples = make_samples(arch, id // per_step, settings.global_batch_size)
        return microbatches(samples, settings.micro_batch_size, id % per_step, per_step)[0]

    with joined_roles(roles) as world:
        if world is None:
            return []
        link = make_link(world, roles, shape, window)
        blocks = pairs.blocks(link.students[0].parallel)
        links = link.to_stages(blocks)
        if world.role == "teacher":
            sender = Senders(links, blocks, shape.width) if world.is_last_stage else None
            model = load(arch, weights, world).freeze()
            serve_signals(ServedTeacher(model, shape, window, pairs=pairs), sender, batch_of, ids)
            return []
        dp, own = world.groups.dp, links.get(world.groups.pp.rank())
        receiver = Receiver(own, own.students[0], ids[dp.rank() :: dp.size()], world.device) if own else None
        remote = RemoteTeacher(
            receiver, "hidden", load_head(arch, weights, world, torch.float32), world, pairs
        )
        metrics = Runner(world, remote, settings)(student_arch, folder, output, stop_after=RESUME_AT).metrics
        assert not remote.held, "a signal is held after its use"
        remote.close()
        return metrics


def without_pairs(layout: Layout, arch: Arch, teacher: Path, settings: DistillConfig, output: Path) -> str:
    """The refusal of a run with states whose teacher has none."""
    with joined(layout) as world:
        try:
            local = ColocatedTeacher(load(arch, teacher, world))
            Runner(world, local, settings)(arch, teacher, output)
        except InputError as error:
            return str(error)
        return ""
