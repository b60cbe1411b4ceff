"""Worker functions of the workflow tests: the command line on a rank, searches and scripts."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pool
from cases import SEQUENCE_LENGTH, Layout
from fake_trackers import wandb_double
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from model_workers import joined

from minitron_mp.cli import main
from minitron_mp.config.recipe import load_recipe
from minitron_mp.config.rounds import ROUNDS
from minitron_mp.data import shards
from minitron_mp.distributed import launcher
from minitron_mp.distributed.launcher import JobRank
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.training.metrics import MetricsLog
from minitron_mp.workflow import training
from minitron_mp.workflow.context import StageContext
from minitron_mp.workflow.fp8_teacher import log_fp8_teacher_kl
from minitron_mp.workflow.graph import StageGraph


class Done(NamedTuple):
    code: int
    out: str
    err: str


def minitron(
    *,
    arguments: list[str],
    free_bytes: float | None = None,
    own_job: bool = False,
    stop_at: int | None = None,
) -> Done:
    """Run the command line on this rank.

    free_bytes: free disk space that the command sees. own_job: the command makes its process
    groups itself, as under torchrun. stop_at: a stop file appears when this step is logged.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(sys, "argv", ["minitron-mp", *arguments]))
        stack.enter_context(patch.dict("os.environ", COLUMNS="160"))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        if own_job:
            stack.enter_context(pool.without_group())
            stack.enter_context(patch.object(launcher, "job_rank", lambda: JobRank(*pool.here["place"])))
        if free_bytes is not None:
            disk = namedtuple("disk", "total used free")(10**15, 10**15 - free_bytes, free_bytes)
            stack.enter_context(patch.object(shutil, "disk_usage", lambda path: disk))
        if stop_at is not None:
            stack.enter_context(patch.object(MetricsLog, "_write", _stopping(MetricsLog._write, stop_at)))
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    RotaryEmbedding.forward.cache_clear()  # holds the last 32 modules and so their groups, see pool.serve
    return Done(code, out.getvalue(), err.getvalue())


def tracked(*, calls: Path, arguments: list[str], stop_at: int | None = None) -> Done:
    """Run minitron() with a double of wandb that writes its calls to a file."""
    with wandb_double(calls):
        return minitron(arguments=arguments, stop_at=stop_at, own_job=True)


def _stopping(write: Any, stop_at: int) -> Any:
    def note(log: Any, metrics: Any) -> None:
        write(log, metrics)
        if metrics.step == stop_at:
            folder = log.path.parent
            output = folder.parents[1] if folder.parent.name == ROUNDS else folder
            (output / "stop").touch()

    return note


def count_parameters(*, arch: Arch, layout: Layout) -> tuple[int, int]:
    """Return (pipeline stage, number of parameters on this rank) of a model."""
    with joined(layout) as world:
        chunks = build_model(
            arch, world, ModelOptions(precision="fp32", sequence_length=SEQUENCE_LENGTH)
        ).chunks
        return world.groups.pp.rank(), sum(p.numel() for chunk in chunks for p in chunk.parameters())


def drift(*, recipe: str) -> tuple[str | None, str | None]:
    """Return the logged KL of an FP8 teacher for an exact copy, and after a weight has changed."""
    project = StageGraph(load_recipe(recipe, ["precision=bf16", "teacher.fp8=tensorwise"]))
    with joined(Layout("one", 1)) as world:
        context = StageContext(project.recipe, project.paths, project.manifest("distill"), world=world)
        model = context.teacher().model
        same = log_fp8_teacher_kl(context, model)
        model.chunks[0].decoder.final_layernorm.weight[::2] *= 1.5
        return same, log_fp8_teacher_kl(context, model)


def correct_beside_fp8_teacher(*, arguments: list[str]) -> Done:
    """Run minitron() with a stage `correct` that sees teacher.fp8, which CPUs do not support."""

    def with_fp8(context: StageContext, *more: Any) -> None:
        teacher = context.recipe.teacher.model_copy(update={"fp8": "tensorwise"})
        recipe = context.recipe.model_copy(update={"teacher": teacher})
        run_training(replace(context, recipe=recipe), *more)

    run_training = training.run_training
    with patch.object(training, "run_training", with_fp8):
        return minitron(arguments=arguments, own_job=True)


class _Stopped(BaseException):
    """Ends a search like a power failure: no handler of Exception catches it."""


def search(*, arguments: list[str], stop_after: int | None = None, leave_after: int | None = None) -> Done:
    """Run minitron() with an interruption.

    stop_after: it ends with code "stopped" after this many measurements. leave_after: a stop file
    appears after this many.
    """
    from minitron_mp.workflow.stages.search.candidates import _Progress

    save = _Progress.save
    measurements = []

    def count(progress: _Progress) -> None:
        save(progress)
        measurements.append(1)
        if len(measurements) == leave_after:
            (progress.context.recipe.root / "stop").touch()
        if len(measurements) == stop_after:
            raise _Stopped

    with patch.object(_Progress, "save", count):
        try:
            return minitron(arguments=arguments)
        except _Stopped:
            return Done("stopped", "", "")


def tokenize(*, arguments: list[str], stop_after: int | None = None, meanwhile: Sequence[str] = ()) -> Done:
    """Run minitron() with small shards.

    stop_after: a stop file appears after this many. meanwhile: a command that runs while the shards
    are put together.
    """
    make, put_together = shards.ShardStore.make, shards.ShardStore.put_together
    made = []

    def disturbed(store: Any, *arguments: Any) -> Any:
        if meanwhile:
            subprocess.run(meanwhile, check=True)
        return put_together(store, *arguments)

    def count(store: Any, shard: Any, progress: Any = None) -> None:
        make(store, shard, progress)
        made.append(shard)
        if len(made) == stop_after:
            (load_recipe(Path(arguments[1])).root / "stop").touch()

    with (
        patch.object(shards, "SHARD_BYTES", 8000),
        patch.multiple(shards.ShardStore, make=count, put_together=disturbed),
    ):
        return minitron(arguments=arguments, own_job=True)


def run_script(path: Path, arguments: list[str]) -> str:
    """Run main() of an example with these arguments, as under torchrun; return its output."""
    spec = importlib.util.spec_from_file_location(f"run_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(patch.object(sys, "argv", [str(path), *arguments]))
        stack.enter_context(pool.without_group())
        stack.enter_context(patch.object(launcher, "job_rank", lambda: JobRank(*pool.here["place"])))
        module.main()
    RotaryEmbedding.forward.cache_clear()  # holds the last 32 modules and so their groups, see pool.serve
    return out.getvalue()


def load_scripts(paths: list[Path]) -> list[str]:
    """Import each file; return the names of those that have a main()."""
    with_main = []
    with patch.object(sys, "path", [*{str(path.parent) for path in paths}, *sys.path]):
        for path in paths:
            spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            if hasattr(module, "main"):
                with_main.append(path.name)
    return with_main
