"""What the training tests run on the ranks of a pool, as in model_workers.py."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch
import torch.distributed as dist
from cases import ONE_STEP, RESUME_AT, SEQUENCE_LENGTH, Layout, make_samples, microbatches, settings
from model_workers import gather, joined, load, manifest
from torch import Tensor

from minitron_mp.artifacts.checkpoint import AsyncCheckpointWriter, load_weights
from minitron_mp.artifacts.saved_model import load_model
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.training import CorrectionConfig, ProfileConfig
from minitron_mp.distillation.teacher import ColocatedTeacher
from minitron_mp.distributed.preemption import Preempted, watch_for_preemption
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.evaluation.quality import compare, evaluate
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.training import loop, optimizer
from minitron_mp.training.distill import distill, train
from minitron_mp.training.loop import train_one
from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.options import RunOptions
from minitron_mp.training.run import TrainingRun
from minitron_mp.training.teacher_correction import TrainableTeacher


def train_everything(
    layout: Layout, arch: Arch, teacher: Path, student_arch: Arch, student: Path, output: Path
) -> dict[str, Any]:
    """Train without interruption, resume, train a student equal to its teacher, and evaluate.

    The checkpoint after RESUME_AT steps stays in output/unbroken. Metrics are rank 0's, []
    elsewhere.
    """
    with joined(layout) as world:
        signals = ColocatedTeacher(load(arch, teacher, world))
        run = Runner(world, signals, settings(layout))
        unbroken = run(student_arch, student, output / "unbroken")
        copy_once(output / "unbroken", output / "resumed")
        resumed = run(student_arch, None, output / "resumed")
        interleaved = (
            layout.dp > 1 and "vpp" in layout.parallel
        )  # wants two microbatches on each data parallel rank
        pure = ONE_STEP.model_copy(update={"ce_weight": 0.0, "micro_batch_size": 2 if interleaved else 4})
        size = 1 if interleaved else 2
        steps = [
            microbatches(make_samples(arch, step, 4), size, world.groups.dp.rank(), world.groups.dp.size())
            for step in range(2)
        ]
        models = {"student": load(student_arch, student, world), "teacher again": signals.model}
        return {
            "unbroken": unbroken.metrics,
            "resumed": resumed.metrics,
            "bitwise": all(map(torch.equal, unbroken.weights, resumed.weights)),
            "same": Runner(world, signals, pure)(arch, teacher, output / "same").metrics,
            "quality": compare(models, signals, steps),
        }


def train_variants(
    layout: Layout,
    arch: Arch,
    teacher: Path,
    student_arch: Arch,
    student: Path,
    output: Path,
    variants: dict[str, DistillConfig],
) -> dict[str, Any]:
    """Train with each of these settings; runs are stopped and resumed if they are long enough.

    Returns (rank 0's metrics, whether the final weights agree over data parallel ranks) by name.
    """
    found = {}
    with joined(layout) as world, small_buckets():
        signals = ColocatedTeacher(load(arch, teacher, world))
        for name, chosen in variants.items():
            runner = Runner(world, None if isinstance(chosen, CorrectionConfig) else signals, chosen)
            run = runner(student_arch, student, output / name, stop_after=RESUME_AT)
            metrics = run.metrics
            if chosen.steps > RESUME_AT:
                run = runner(student_arch, None, output / name)
                metrics = metrics + run.metrics
            whole = torch.cat([weight.flatten() for weight in run.weights])
            copies = gather(whole[None], 0, world.groups.dp_cp)
            found[name] = metrics, bool((copies == whole).all())
    return found


def correct_meanwhile(
    layout: Layout,
    arch: Arch,
    teacher: Path,
    student_arch: Arch,
    student: Path,
    output: Path,
    correct: CorrectionConfig,
    precision: str,
) -> dict[str, Any]:
    """Distil a student while its teacher is corrected: uninterrupted, and stopped and resumed.

    Also returns the curve of the teacher trained separately, its last step again, and the distance
    of the first step's student to the teachers of the first and the second step, on the batch of
    the second step. Curves are rank 0's, [] elsewhere.
    """
    distil, folder, found = (
        settings(layout).model_copy(update={"temperature": 1.0}),
        output / "meanwhile",
        {},
    )  # compare() has no other
    correct = correct.model_copy(
        update={"micro_batch_size": distil.micro_batch_size, "overlap": layout.dp > 1}
    )
    with joined(layout) as world:

        def start(curve: list[StepMetrics]) -> TrainableTeacher:
            model = build_model(
                arch,
                world,
                ModelOptions(precision=precision, sequence_length=SEQUENCE_LENGTH, training=correct),
            )
            load_weights(model.chunks, teacher, world)
            options = RunOptions(None, manifest("distill"), on_step=curve.append)
            return TrainableTeacher(TrainingRun(model, None, correct, options))

        for name, parts in (("unbroken", (None,)), ("resumed", (RESUME_AT, None))):
            students, teachers = [], []
            for number, stop_after in enumerate(parts):
                learner = start(teachers)
                begin = student if number == 0 else None
                run = Runner(world, learner, distil, precision)(
                    student_arch, begin, folder / name, stop_after=stop_after, extra_state=learner
                )
                learner.close()
                students += run.metrics
            weights = [
                parameter.detach().clone()
                for chunk in learner.model.chunks
                for parameter in chunk.parameters()
            ]
            found[name] = {"student": students, "teacher": teachers, "weights": run.weights + weights}
        found["bitwise"] = all(
            map(torch.equal, found["unbroken"].pop("weights"), found["resumed"].pop("weights"))
        )
        # The teacher alone, and the student of the first step against the teacher of the second.
        alone = correct.model_copy(update={"checkpoint_interval": 1, "keep_checkpoints": 9})
        whole, rest = (
            Runner(world, None, alone, precision)(arch, start, output / "alone") for start in (teacher, None)
        )
        found |= {
            "alone": whole.metrics,
            "alone resumed": rest.metrics,
            "alone bitwise": all(map(torch.equal, whole.weights, rest.weights)),
        }
        learner = start([])
        once = Runner(world, learner, distil, precision)(
            student_arch, student, folder / "once", stop_after=1, extra_state=learner
        )
        learner.close()
        model = load(student_arch, student, world, precision)
        for parameter, weight in zip(
            (parameter for chunk in model.chunks for parameter in chunk.parameters()), once.weights
        ):
            parameter.data.copy_(weight)
        batches = microbatches(
            make_samples(arch, 1, distil.global_batch_size),
            distil.micro_batch_size,
            world.groups.dp.rank(),
            world.groups.dp.size(),
        )
        for name, place in (("first", teacher), ("second", output / "alone" / "step_00000001")):
            frozen = ColocatedTeacher(load(arch, place, world, precision))
            found[f"kl to the {name}"] = compare({"": model}, frozen, [batches])[""].kl
        return found


def leave(
    layout: Layout, arch: Arch, teacher: Path, student_arch: Arch, student: Path, output: Path
) -> dict[str, Any]:
    """Stop runs, each in another way, and resume them.

    Returns name -> (rank 0's metrics of each part, names of the checkpoints between them).
    """
    found: dict[str, Any] = {}
    with joined(layout) as world, watch_for_preemption(output) as leaving:
        output.mkdir(parents=True, exist_ok=True)
        signals = ColocatedTeacher(load(arch, teacher, world))
        usual = settings(layout).model_copy(update={"checkpoint_interval": 9})

        def stop_file(step: StepMetrics) -> None:
            if step.step == 1:
                leaving.stop_file.touch()

        def term(step: int) -> int:
            if step == 1 and world.rank == world.size - 1:  # during the second step, on the last rank alone
                os.kill(os.getpid(), signal.SIGTERM)
            return step

        def parts(name: str, chosen: DistillConfig, **told: Any) -> None:
            run = Runner(replace(world, preemption=leaving), signals, chosen)
            first = run(student_arch, student, output / name, **told)
            leaving.stop_file.unlink(missing_ok=True)
            leaving.sigterm, leaving.deadline = False, None
            between = sorted(path.name for path in (output / name).iterdir())
            dist.barrier()
            found[name] = [first.metrics, run(student_arch, None, output / name).metrics], between
            dist.barrier()

        parts("stop file", usual, on_step=stop_file)
        parts(
            "SIGTERM",
            usual.model_copy(update={"async_save": True, "checkpoint_interval": 1}),
            batch_of_step=term,
        )
        leaving.deadline = (
            time.time() + 1e6
        )  # far off: only the time of a checkpoint is wanted, after the first step
        parts("far deadline", usual, stop_after=3)
        leaving.deadline = time.time()
        parts("deadline", usual)
    return found


def killed_writer(
    layout: Layout, arch: Arch, teacher: Path, student_arch: Arch, student: Path, output: Path
) -> dict[str, Any]:
    """Kill the writers of background checkpoints during the second one, then resume.

    Returns the files on disk, the messages, and the resumed run.
    """
    with joined(layout) as world:
        signals = ColocatedTeacher(load(arch, teacher, world))
        chosen = settings(layout).model_copy(update={"async_save": True, "checkpoint_interval": 1})
        run, said, writers = Runner(world, signals, chosen), "", []
        start = AsyncCheckpointWriter.start

        def slow(background: AsyncCheckpointWriter, state: Any, folder: Path, *rest: Any) -> None:
            """The second checkpoint's writers never come to an end by themselves."""
            second = folder.name == "step_00000002"
            with patch.object(os, "fsync", lambda number: time.sleep(600)) if second else nullcontext():
                start(background, state, folder, *rest)
            if second:
                own = background.queue.async_calls[0].async_caller.process
                writers.append(background.writing)
                time.sleep(0.3)
                for child in (
                    [*psutil.Process(own.pid).children(recursive=True), psutil.Process(own.pid)]
                    if own
                    else []
                ):
                    with suppress(psutil.NoSuchProcess):
                        child.kill()

        with patch.object(AsyncCheckpointWriter, "start", slow):
            try:
                run(student_arch, student, output)
            except InputError as error:
                said = str(error)
        left = sorted(path.name for path in output.iterdir())
        if dist.get_rank() == 0:  # as a kill of the job leaves it, which has nobody to tidy up
            (output / ".step_00000002.tmp").mkdir()
            (output / ".step_00000002.tmp" / "__0_0.distcp").write_bytes(b"half")
        dist.barrier()
        rest = run(student_arch, None, output).metrics
        return {
            "said": said,
            "left": left,
            "writing": writers,
            "rest": rest,
            "at the end": sorted(path.name for path in output.iterdir()),
        }


def profiled(
    layout: Layout, arch: Arch, teacher: Path, student_arch: Arch, student: Path, output: Path
) -> list[str]:
    """Return the rejected settings.

    Traces of the last rank's second and third step are written to the folder.
    """
    with joined(layout) as world:
        signals, said = (
            ColocatedTeacher(load(arch, teacher, world)),
            [],
        )
        for profile in (
            ProfileConfig(steps=[2, 3], ranks=[0, world.size]),
            ProfileConfig(steps=[2, 3], kind="nsys"),
            ProfileConfig(steps=[2, 3], ranks=[world.size - 1]),
        ):
            run = Runner(world, signals, settings(layout).model_copy(update={"profile": profile}))
            try:
                run(student_arch, student, output / "run", stop_after=3, profile_folder=output)
            except InputError as error:
                said.append(str(error))
        return said


@contextmanager
def small_buckets() -> Iterator[None]:
    """Megatron's buckets of gradients hold 40 million and more: these models would fit in one."""
    usual = optimizer.DistributedDataParallelConfig
    optimizer.DistributedDataParallelConfig = partial(usual, bucket_size=5000)
    try:
        yield
    finally:
        optimizer.DistributedDataParallelConfig = usual


def resume(
    layout: Layout, arch: Arch, teacher: Path, student_arch: Arch, stopped: Path, output: Path
) -> list[StepMetrics]:
    """The rest of a run that another layout stopped; rank 0's metrics."""
    with joined(layout) as world:
        copy_once(stopped, output)
        signals = ColocatedTeacher(load(arch, teacher, world))
        return Runner(world, signals, settings(layout))(student_arch, None, output).metrics


def copy_once(source: Path, target: Path) -> None:
    if dist.get_rank() == 0:
        shutil.copytree(source, target)
    dist.barrier()


@dataclass
class Run:
    """metrics: rank 0's, one entry a step. weights: this rank's, at the end."""

    metrics: list[StepMetrics]
    weights: list[Tensor]


@dataclass
class Runner:
    """train_one() with the batches of these tests."""

    world: World
    teacher: Any
    settings: DistillConfig
    precision: str = "fp32"
    lr_in_manifest: int = 0
    """Something by which two runs can differ."""
    measure: Any = None
    """RunOptions.measure."""

    def __call__(
        self,
        arch: Arch,
        start: Path | None,
        checkpoints: Path,
        *,
        stop_after: int | None = None,
        batch_of_step: Callable[[int], int] = lambda step: step,
        extra_state: Any = None,
        on_step: Callable[[StepMetrics], None] = lambda metrics: None,
        **more: Any,
    ) -> Run:
        """start: the student's first weights; None for a run that resumes."""
        world, chosen, metrics = self.world, self.settings, []
        model = build_model(
            arch,
            world,
            ModelOptions(precision=self.precision, sequence_length=SEQUENCE_LENGTH, training=chosen),
        )
        if start is not None:
            load_weights(model.chunks, start, world)

        def batches_of(step: int) -> list[dict[str, Tensor]]:
            samples = make_samples(arch, batch_of_step(step), chosen.global_batch_size)
            return microbatches(
                samples, chosen.micro_batch_size, world.groups.dp.rank(), world.groups.dp.size()
            )

        def note(step: StepMetrics) -> None:
            metrics.append(step)
            on_step(step)

        options = RunOptions(
            checkpoints,
            manifest("distill", lr=self.lr_in_manifest),
            seed=3,
            on_step=note,
            extra_state=extra_state,
            measure=self.measure,
        )
        with suppress(Preempted):
            train_one(model, self.teacher, batches_of, chosen, options, stop_after=stop_after, **more)
        return Run(
            metrics,
            [parameter.detach().clone() for chunk in model.chunks for parameter in chunk.parameters()],
        )


def distill_from_python(
    layout: Layout, arch: Arch, teacher: Path, student_arch: Arch, student: Path, output: Path
) -> dict[str, Any]:
    """Distil with the public functions alone: metrics, saved weights and quality of the saved model."""
    chosen = settings(layout)
    with joined(layout) as world:
        dp = world.groups.dp

        def batches_of(step: int) -> list[dict[str, Tensor]]:
            samples = make_samples(student_arch, step, chosen.global_batch_size)
            return microbatches(samples, chosen.micro_batch_size, dp.rank(), dp.size())

        build = {"sequence_length": SEQUENCE_LENGTH, "precision": "fp32"}
        guide = ColocatedTeacher(load_model(teacher, world, **build))
        model = load_model(student, world, training=chosen, **build)
        metrics: list[StepMetrics] = []
        distill(model, guide, batches_of, chosen, out=output, seed=3, on_step=metrics.append)
        without_artifact: list[StepMetrics] = []
        other = load_model(student, world, training=chosen, **build)
        train(other, guide, batches_of, chosen, seed=3, on_step=without_artifact.append)
        saved = load_model(output, world, **build)
        pairs = [
            (mine, theirs)
            for one, other in zip(model.chunks, saved.chunks)
            for mine, theirs in zip(one.parameters(), other.parameters())
        ]
        return {
            "metrics": metrics,
            "metrics without artifact": without_artifact,
            "saved": all(torch.equal(mine, theirs) for mine, theirs in pairs),
            "arch": saved.arch,
            "quality": evaluate(saved, batches_of(0), guide),
            "checkpoints": sorted(path.name for path in output.parent.glob("*_checkpoints*")),
        }


def wrong_arguments_from_python(
    layout: Layout, arch: Arch, teacher: Path, student_arch: Arch, student: Path, output: Path
) -> dict[str, Any]:
    """Errors of train() by mistake, traces of its profile, and entered communication buffers."""
    chosen = settings(layout)
    found: dict[str, Any] = {}
    with joined(layout) as world:
        dp = world.groups.dp
        build = {"sequence_length": SEQUENCE_LENGTH, "precision": "fp32"}
        guide = ColocatedTeacher(load_model(teacher, world, **build))
        model = load_model(student, world, training=chosen, **build)

        def batches_of(step: int) -> list[dict[str, Tensor]]:
            samples = make_samples(student_arch, step, chosen.global_batch_size)
            return microbatches(samples, chosen.micro_batch_size, dp.rank(), dp.size())

        def error(teacher: ColocatedTeacher | None, **changes: Any) -> str:
            with pytest.raises(InputError) as raised:
                train(model, teacher, batches_of, chosen.model_copy(update=changes))
            return str(raised.value)

        profile = ProfileConfig(steps=[1, 1], ranks=[0])
        found["errors"] = {
            "no teacher": error(None),
            "profile": error(guide, profile=profile),
            "global": error(guide, global_batch_size=2 * chosen.global_batch_size),
            "micro": error(guide, micro_batch_size=3),
        }
        entered = []

        @contextmanager
        def buffers(training: Any, model: Any) -> Iterator[None]:
            entered.append(training)
            yield

        short = chosen.model_copy(update={"steps": 1, "warmup_steps": 0, "profile": profile})
        with patch.object(loop, "communication_buffers", buffers):
            distill(model, guide, batches_of, short, out=output)
        found["buffers"] = len(entered)
        found["traces"] = sorted(path.name for path in output.with_name(f"{output.name}_profile").iterdir())
        return found


def train_in_bf16(
    layout: Layout, arch: Arch, teacher: Path, student_arch: Arch, student: Path, output: Path, steps: int
) -> list[float]:
    """Losses of a few steps on one batch, teacher and student in bf16."""
    with joined(layout) as world:
        signals = ColocatedTeacher(load(arch, teacher, world, "bf16"))
        chosen = settings(layout).model_copy(update={"steps": steps})
        run = Runner(world, signals, chosen, precision="bf16")
        return [m.loss for m in run(student_arch, student, output, batch_of_step=lambda step: 0).metrics]
