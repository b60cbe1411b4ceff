"""Compare distillation steps on this GPU with the estimates of `minitron-mp estimate`.

    Some minutes on an H100:
    python benchmarks/planner_check.py examples/mn_minitron_8b.yaml [--times FILE] [overrides]

    On a CPU, to test the program only:
    python benchmarks/planner_check.py recipe.yaml --toy

It runs three configurations of the recipe's widths on one GPU: the recipe; FP8 (with Transformer
Engine); half the sequence length with two samples per microbatch and recomputation. Student and
teacher have --layers layers and random weights; the optimizer is included. It prints measured step
time and peak memory beside those of the planner, without its correction towards published rates.
The exit code is 1 if the time differs by more than 15 % or the memory by more than 10 %. The planner
should use layer times of this machine, from benchmarks/layers.py; the default is the shipped ones.
NOT RUN ON A GPU YET.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from layers import DEVICE, _forget, _gpu, _wait

from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe, load_recipe, make_recipe
from minitron_mp.distillation.teacher import ColocatedTeacher, with_signals
from minitron_mp.distributed.world import World, join_world
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.planning.case import PlanningCase
from minitron_mp.planning.command import read_models
from minitron_mp.planning.hardware import read_hardware
from minitron_mp.planning.memory import uses_transformer_engine
from minitron_mp.planning.step_time import estimate_distillation
from minitron_mp.planning.times import Times, read_times
from minitron_mp.training.loop import take_step
from minitron_mp.training.options import RunOptions
from minitron_mp.training.run import TrainingRun

TIME, MEMORY = 0.15, 0.10
"""What the planner may be off."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--times", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="the first two are not counted")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if DEVICE.type != "cuda" and not args.toy:
        parser.error("this needs a GPU; --toy tries the program on a CPU")
    gpu = "h100" if args.toy else _gpu()
    times = read_times(gpu, read_hardware(gpu), args.times)
    off = []
    print(
        f"{'configuration':34} {'step ms':>8} {'planned':>8} {'off':>6} "
        f"{'peak GiB':>9} {'planned':>8} {'off':>6}"
    )
    with join_world(ParallelConfig(), seed=1) as world:
        for name, recipe in configurations(
            load_recipe(args.recipe, args.overrides), args.microbatches
        ).items():
            off += compare(name, recipe, args.layers, args.steps, world, times)
    if off and not args.toy:
        print("more off than 15 % (time) or 10 % (memory): " + "; ".join(off))
        sys.exit(3)  # 1 is the exit code of an exception


def configurations(recipe: Recipe, microbatches: int) -> dict[str, Recipe]:
    """Name -> recipe of one GPU."""

    def of(sequence: int, batch: int, teacher_fp8: str | None = None, **training: Any) -> Recipe:
        values = recipe.model_dump()
        values |= {
            "parallel": {},
            "correct": None,
            "search": None if recipe.target.given else values["search"],
        }
        values["data"]["sequence_length"] = sequence
        values["teacher"] = {
            "model": recipe.teacher.model,
            "precision": recipe.teacher.precision,
            "fp8": teacher_fp8,
        }
        values["distill"] |= {
            "micro_batch_size": batch,
            "global_batch_size": batch * microbatches,
            "recompute": False,
            "overlap": False,
            "tp_comm_overlap": False,
            "cuda_graphs": False,
            "states": None,
        } | training
        return make_recipe(values)

    sequence = recipe.data.sequence_length
    found = {"as it is": of(sequence, 1)}
    if "fp8" in type(recipe.distill).model_fields and DEVICE.type == "cuda":
        found["FP8 tensorwise, both models"] = of(sequence, 1, teacher_fp8="tensorwise", fp8="tensorwise")
    return found | {"half as long, two, recomputing": of(sequence // 2, 2, recompute=True)}


def compare(name: str, recipe: Recipe, num_layers: int, steps: int, world: World, times: Times) -> list[str]:
    """Measure, print, and say what is too far off."""
    models = read_models(recipe)
    teacher = models.teacher.resized(num_layers=num_layers)
    student = models.student.resized(num_layers=num_layers)
    planned = estimate_distillation(PlanningCase(student, teacher, recipe, 1), times)
    _forget()
    base = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = run_steps(student, teacher, recipe, steps, world)
    peak = torch.cuda.max_memory_allocated() - base if DEVICE.type == "cuda" else float("nan")
    rows = (("time", seconds, planned.arithmetic_s, TIME), ("memory", peak, planned.needed_bytes, MEMORY))
    wrong = {what: estimate / found - 1 for what, found, estimate, _ in rows}
    times_ms = f"{seconds * 1e3:8.1f} {planned.arithmetic_s * 1e3:8.1f} {wrong['time']:6.1%}"
    print(
        f"{name:34} {times_ms} {peak / 2**30:9.2f} {planned.needed_bytes / 2**30:8.2f} "
        f"{wrong['memory']:6.1%}",
        flush=True,
    )
    if not uses_transformer_engine(recipe) and DEVICE.type == "cuda":
        print(f"{'':34} the local layers computed; the layer times that are shipped are Transformer Engine's")
    return [f"{name}: {what} {wrong[what]:.1%}" for what, _, _, allowed in rows if abs(wrong[what]) > allowed]


def run_steps(student: Arch, teacher: Arch, recipe: Recipe, steps: int, world: World) -> float:
    """Seconds of a step, the median of all but the first two."""
    d, sequence = recipe.distill, recipe.data.sequence_length
    common: dict[str, Any] = {"sequence_length": sequence, "random_weights": True}
    options: list[dict[str, Any]] = [{}, {}]
    if "transformer_impl" in Recipe.model_fields:
        options = [
            {"transformer_impl": vars(recipe)["transformer_impl"], "fp8": fp8}
            for fp8 in (None, vars(recipe.teacher)["fp8"])
        ]
    taught = build_model(
        teacher, world, ModelOptions(precision=recipe.teacher_precision, **common, **options[1])
    )
    model = build_model(
        student, world, ModelOptions(precision=recipe.precision, training=d, **common, **options[0])
    )
    source = ColocatedTeacher(taught)
    manifest = Manifest(stage="distill", settings={}, inputs={}, arch=student)
    training = TrainingRun(model, source, d, RunOptions(None, manifest))
    tokens = torch.randint(0, student.vocab_size, (d.micro_batch_size, sequence))
    positions = torch.arange(sequence).expand_as(tokens).contiguous()
    batch = {
        "tokens": tokens,
        "labels": tokens,
        "loss_mask": torch.ones(tokens.shape),
        "position_ids": positions,
    }
    batches = [batch] * (d.global_batch_size // d.micro_batch_size)
    found = []
    for step in range(steps):
        _wait()
        start = time.perf_counter()
        take_step(training, with_signals(source, batches, step))
        _wait()
        found.append(time.perf_counter() - start)
    training.finalize()
    return statistics.median(found[2:])


if __name__ == "__main__":
    main()
