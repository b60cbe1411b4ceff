"""Measure the times of layers and loss at a recipe's widths.

It writes the JSON file for `minitron-mp estimate --times FILE`.

    Minutes on a GPU:
    python benchmarks/layers.py examples/mn_minitron_8b.yaml --out h100.json
    python benchmarks/layers.py examples/mn_minitron_8b.yaml --out h100.json --tp 1,2,4,8 \\
        --sequence 4096,8192

    On a CPU, to test the program only:
    python benchmarks/layers.py recipe.yaml --out toy.json --gpu h100 --layers 2 --repeats 2

Student and teacher have --layers layers, a small vocabulary and random weights.
train: zeroed gradients, forward and backward pass of the student, under Megatron's wrapper.
forward: teacher and student without gradients.
loss: both output layers, forward and backward.

A tp shard is one GPU's part without communication
(torch's 'fake' process group); the planner adds the communication. Times are medians of --repeats
after as many warm-ups, with ms_min and ms_max. The file also has the ceiling of matrix products,
the copy rate, and the launch time of the host.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe, load_recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.distributed.world import World, build_groups, leave_job
from minitron_mp.errors import InputError
from minitron_mp.losses.fused import distillation_loss
from minitron_mp.losses.objective import Objective, TeacherHidden
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.models.sharded_model import DTYPES
from minitron_mp.planning.command import read_models
from minitron_mp.planning.hardware import GPUS

SIZES = (
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "activation",
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpu", choices=list(GPUS), help="default: by the name of the device")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tp", type=_numbers, default=[1])
    parser.add_argument("--sequence", type=_numbers, help="default: the recipe's")
    parser.add_argument("--micro-batch-size", type=_numbers, default=[1])
    parser.add_argument(
        "--dtypes",
        help="bf16, fp32, tensorwise, delayed, blockwise, separated by commas; "
        "default: the recipe's precision and the FP8 of its sections",
    )
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    recipe = load_recipe(args.recipe, args.overrides)
    models = read_models(recipe)
    teacher = models.teacher
    student = models.student
    dtypes = args.dtypes.split(",") if args.dtypes else _dtypes_of(recipe)
    points = []
    for tp in args.tp:
        with shard(tp) as world:
            for sequence in args.sequence or [recipe.data.sequence_length]:
                for batch in args.micro_batch_size:
                    where = {
                        "num_layers": args.layers,
                        "tp": tp,
                        "sequence_length": sequence,
                        "micro_batch_size": batch,
                    }
                    for dtype in dtypes:
                        for arch, what in ((student, "train"), (student, "forward"), (teacher, "forward")):
                            points.append(time_layers(arch, what, dtype, where, world, recipe, args.repeats))
                            _tell(points[-1])
                    for logits in dict.fromkeys(["bf16" if recipe.precision == "bf16" else "fp32", "fp32"]):
                        points.append(
                            time_loss(
                                student,
                                teacher,
                                logits,
                                sequence * batch,
                                world,
                                recipe.precision,
                                args.repeats,
                            )
                        )
                        _tell(points[-1])
    rates, copy = ceilings(student, args.repeats)
    host = {
        name: max(
            p["host_ms"] / p["num_layers"]
            for p in points
            if p["what"] == "train" and (p["dtype"] in DTYPES) == (name == "bf16")
        )
        for name in _kinds(dtypes)
    }
    content = {
        "gpu": args.gpu or _gpu(),
        "about": about(),
        "gemm_tflops": rates,
        "copy_tb_s": copy,
        "host_ms_per_layer": host,
        "points": points,
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{args.out}: {len(points)} points")


def time_layers(
    arch: Arch, what: str, dtype: str, where: dict[str, int], world: World, recipe: Recipe, repeats: int
) -> dict[str, Any]:
    """A point of the file."""
    small = arch.resized(num_layers=where["num_layers"]).model_copy(update={"vocab_size": 128, "tied": False})
    precision = dtype if dtype in DTYPES else "bf16"
    training = (
        TrainingConfig().model_copy(update={"fp8": None if dtype in DTYPES else dtype})
        if what == "train"
        else None
    )
    options: dict[str, Any] = {
        "precision": precision,
        "sequence_length": where["sequence_length"],
        "random_weights": True,
        "training": training,
    }
    if "transformer_impl" in Recipe.model_fields:
        options |= {
            "transformer_impl": vars(recipe)["transformer_impl"],
            "fp8": None if what == "train" or dtype in DTYPES else dtype,
        }
    elif dtype not in DTYPES:
        raise InputError(f"--dtypes {dtype}: this version builds no FP8 model")
    _forget()
    base = _allocated()
    (model,) = build_model(small, world, ModelOptions(**options)).chunks
    tokens = torch.randint(0, 128, (where["micro_batch_size"], where["sequence_length"]), device=DEVICE)
    positions = torch.arange(where["sequence_length"], device=DEVICE).expand_as(tokens)
    if what == "train":
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        model = DistributedDataParallel(model.config, ddp, model, pg_collection=world.groups).train()
        gradient = torch.randn_like(model(tokens, positions, None))

        def work() -> None:
            model.zero_grad_buffer()
            model.set_is_first_microbatch()  # FP8 copies of the weights are made once a step
            model(tokens, positions, None).backward(gradient)
    else:
        model = model.eval().requires_grad_(False)

        def work() -> None:
            with torch.no_grad():
                model(tokens, positions, None)

    found = measure(work, repeats)
    peak = (torch.cuda.max_memory_allocated() - base) / 2**30 if DEVICE.type == "cuda" else None
    return {
        "what": what,
        "dtype": dtype,
        **{name: getattr(arch, name) for name in SIZES},
        **where,
        **found,
        "peak_gib": peak,
    }


def time_loss(
    student: Arch, teacher: Arch, logits: str, tokens: int, world: World, precision: str, repeats: int
) -> dict[str, Any]:
    """Both output layers with forward KL for this vocabulary shard, as the trainer calls them.

    The gradient of the weight is added to a float32 buffer.
    """
    _forget()
    dtype, columns = DTYPES[precision], student.padded_vocab_size // world.parallel.tp
    weights = [
        torch.randn(columns, arch.hidden_size, device=DEVICE, dtype=dtype) * 0.02
        for arch in (student, teacher)
    ]
    weights[0].requires_grad_().main_grad = torch.zeros(columns, student.hidden_size, device=DEVICE)
    hidden, taught = (
        torch.randn(tokens, 1, arch.hidden_size, device=DEVICE, dtype=dtype) for arch in (student, teacher)
    )
    hidden.requires_grad_()
    labels, ones = (
        torch.zeros(tokens, 1, dtype=torch.int64, device=DEVICE),
        torch.ones(tokens, 1, device=DEVICE),
    )
    objective = Objective(logits_dtype=DTYPES[logits])

    class Whole:  # sequence parallelism gathers before the loss; here the rows are whole
        rank, size = staticmethod(lambda: 0), staticmethod(lambda: 1)

    def work() -> None:
        hidden.grad = None
        loss, _ = distillation_loss(
            hidden,
            weights[0],
            labels,
            ones,
            TeacherHidden(taught, weights[1]),
            objective,
            vocab_size=columns,
            group=Whole,
        )
        loss.backward()

    found = measure(work, repeats)
    place = {
        "hidden_size": student.hidden_size,
        "teacher_hidden_size": teacher.hidden_size,
        "vocab_size": student.padded_vocab_size,
    }
    return {"what": "loss", "dtype": logits, **place, "tokens": tokens, "tp": world.parallel.tp, **found}


def ceilings(arch: Arch, repeats: int) -> tuple[dict[str, float], float]:
    """(TFLOP/s of a large product by kind of number, TB/s read and written by a copy)."""
    rows, inner, columns = (
        (8192, arch.hidden_size, arch.widths().fc1) if DEVICE.type == "cuda" else (512, 512, 512)
    )
    found = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(shape, device=DEVICE, dtype=dtype) for shape in ((rows, inner), (columns, inner)))
        found[name] = 2 * rows * inner * columns / measure(lambda a=a, b=b: a @ b.T, repeats)["ms"] / 1e9
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=DEVICE)
        ms = measure(
            lambda: torch._scaled_mm(
                a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
            ),
            repeats,
        )["ms"]
        found["fp8"] = 2 * rows * inner * columns / ms / 1e9
    source = torch.empty(1 << (30 if DEVICE.type == "cuda" else 24), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return found, 2 * source.nbytes / measure(lambda: target.copy_(source), repeats)["ms"] / 1e9


def measure(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    """ms: median over repeats of a synchronised run; host_ms: until the call returns."""
    for _ in range(repeats):
        work()
    _wait()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, issued = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        issued.append(time.perf_counter() - start)
        _wait()
        times.append(time.perf_counter() - start)
    return {
        "ms": 1e3 * statistics.median(times),
        "ms_min": 1e3 * min(times),
        "ms_max": 1e3 * max(times),
        "host_ms": 1e3 * statistics.median(issued),
    }


@contextmanager
def shard(tp: int) -> Iterator[World]:
    """The first of tp tensor parallel ranks, which hears nothing of the others."""
    dist.init_process_group("fake", rank=0, world_size=tp, store=FakeStore())
    try:
        yield build_groups(ParallelConfig(tp=tp, sequence_parallel=tp > 1), DEVICE, 1)
    finally:
        leave_job(DEVICE)


def about() -> dict[str, str]:
    found = []
    for name in ("torch", "megatron-core", "transformer-engine", "triton"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    device = (
        torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    return {
        "hardware": device,
        "versions": ", ".join(found),
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "kind": "measured",
    }


def _gpu() -> str:
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    for key in GPUS:
        if key.upper() in name:
            return key
    raise InputError(
        f"{name} is none of {', '.join(GPUS)}; say with --gpu whose numbers the planner shall stretch"
    )


def _dtypes_of(recipe: Recipe) -> list[str]:
    given = [vars(section).get("fp8") for section in (recipe.distill, recipe.teacher)]
    return list(dict.fromkeys([recipe.precision, *filter(None, given)]))


def _kinds(dtypes: list[str]) -> list[str]:
    return list(dict.fromkeys("bf16" if dtype in DTYPES else "fp8" for dtype in dtypes))


def _tell(point: dict[str, Any]) -> None:
    what = f"{point['what']:8} {point['dtype']:10} hidden {point['hidden_size']:6} tp {point['tp']}"
    print(
        f"{what}  {point['ms']:9.2f} ms ({point['ms_min']:.2f} to {point['ms_max']:.2f}), "
        f"launched in {point['host_ms']:.2f}",
        flush=True,
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _forget() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
