"""Time and memory of a distillation step with the widths of Mistral NeMo 12B -> Minitron 8B.

    python benchmarks/step.py --out step.json    on a GPU: 4 + 4 layers, 8192 tokens
    python benchmarks/step.py --fp8 tensorwise delayed blockwise    other scalings
    python benchmarks/step.py                    on a CPU: small sizes, bf16 only, as a test

Rows compare our loss with a naive one, and bf16 with FP8. Columns:
step: teacher and student forward, both output layers, loss, backward, float32 gradients; median.
adam: the optimizer; median.
TFLOP/s: FLOPs of both models, by the planner's formula, over `step`.
of ceiling: TFLOP/s over those of the fastest matrix product of the same run, in the number format
of the layers. The output layers are bf16 in all rows.
beyond: peak memory of a step minus the memory between steps (weights, gradients, optimizer). It
contains activations, both models' hidden states and the loss. Activations are computed by the
planner's formula; the last column is the remainder.

naive: logits of all tokens of both models, softmax and KL in float32 in plain torch with autograd.
FP8 rows: linear layers of both models are FP8, and so are the teacher's weights. Weights and tokens
are random. This changes the time only through the power limit.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distillation.teacher import ColocatedTeacher, signal_of, with_signals
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.world import World, join_world
from minitron_mp.errors import InputError
from minitron_mp.losses.objective import TeacherHidden
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.models.flops import forward_flops, training_flops
from minitron_mp.models.hf_config import read_arch
from minitron_mp.models.precision import engine_version, release_cuda_graphs
from minitron_mp.models.sharded_model import logits, unwrap
from minitron_mp.planning.activations import activation_bytes_per_token
from minitron_mp.training.options import RunOptions
from minitron_mp.training.run import TrainingRun

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
SMALL = {
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
}
SMALL_HEADS = {"kv_channels": 32, "vocab_size": 1024}
GIB = 2**30
LOSSES = ("naive", "ours", "ours, bf16 logits")


@dataclass(frozen=True)
class Case:
    """The models of all rows, and how often a step is timed."""

    teacher: Arch
    student: Arch
    sequence_length: int
    repeats: int


@dataclass(frozen=True)
class Row:
    """One row of the table: number format, loss, CUDA graphs."""

    fp8: str | None
    loss: str
    graphs: bool

    @property
    def layers(self) -> str:
        """Name of the row's layers."""
        return f"{self.fp8 or 'bf16'}{', graphs' if self.graphs else ''}"


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore")
    on_gpu = torch.cuda.is_available()
    case = make_case(args, on_gpu)
    with join_world(ParallelConfig(), seed=1) as world:
        ceilings = {"bf16": ceiling(None, world)}
        if on_gpu and args.fp8:
            ceilings["fp8"] = ceiling("fp8", world)
        rows = []
        for row in table_rows(args, on_gpu):
            try:
                found = measure(case, row, world)
            except (torch.OutOfMemoryError, InputError) as problem:
                print(f"{row.layers}, {row.loss}: does not run: {str(problem).splitlines()[0][:100]}")
                continue
            found["of_ceiling"] = found["tflops"] / ceilings["fp8" if row.fp8 else "bf16"]
            rows.append(found)
            _collect()
    content = {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformer_engine": engine_version(),
        "date": time.strftime("%Y-%m-%d"),
        "sizes": {
            "layers": [args.layers, args.layers],
            "sequence_length": case.sequence_length,
            "teacher": case.teacher.model_dump(),
            "student": case.student.model_dump(),
        },
        "ceilings_tflops": ceilings,
        "rows": rows,
    }
    show(content)
    if args.out:
        args.out.write_text(json.dumps(content, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4, help="of each model")
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument(
        "--fp8",
        nargs="*",
        choices=("tensorwise", "delayed", "blockwise"),
        default=["tensorwise"],
        help="for the student; delayed: teacher tensorwise",
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="add each row with distill.cuda_graphs; the gain shows with --sequence-length 4096 or less",
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def make_case(args: argparse.Namespace, on_gpu: bool) -> Case:
    """Return the sizes: those of the 12B and the 8B model on a GPU, small ones on a CPU."""
    teacher = read_arch(CONFIGS / "mistral_nemo_12b", weights=False).resized(num_layers=args.layers)
    student_sizes = {"hidden_size": 4096, "ffn_hidden_size": 11520}
    if not on_gpu:
        teacher = teacher.resized(**SMALL).model_copy(update=SMALL_HEADS)
        student_sizes = {"hidden_size": 96, "ffn_hidden_size": 192}
    sequence_length = args.sequence_length or (8192 if on_gpu else 64)
    return Case(teacher, teacher.resized(**student_sizes), sequence_length, args.repeats)


def table_rows(args: argparse.Namespace, on_gpu: bool) -> list[Row]:
    formats = [None, *args.fp8] if on_gpu else [None]
    graphs = (False, True) if args.cuda_graphs else (False,)
    return [Row(*row) for row in itertools.product(formats, LOSSES, graphs)]


def show(content: dict[str, Any]) -> None:
    """Print the table."""
    layers = " + ".join(map(str, content["sizes"]["layers"]))
    print(
        f"{content['device']}, torch {content['torch']}, "
        f"Transformer Engine {content['transformer_engine']}, {layers} layers, "
        f"{content['sizes']['sequence_length']} tokens"
    )
    ceilings = [f"{name} {value:.3g}" for name, value in content["ceilings_tflops"].items()]
    print("fastest matrix product, TFLOP/s: " + ", ".join(ceilings))
    print(
        f"{'layers':18} {'loss':18} {'step ms':>8} {'least':>8} {'most':>8} {'adam ms':>8} "
        f"{'TFLOP/s':>8} {'of ceiling':>10} {'held GiB':>9} {'beyond':>7} {'activations':>11} {'rest':>6}"
    )
    for r in content["rows"]:
        print(
            f"{r['layers']:18} {r['loss']:18} {r['step_ms']:8.1f} {r['least_ms']:8.1f} {r['most_ms']:8.1f} "
            f"{r['adam_ms']:8.1f} {r['tflops']:8.3g} {r['of_ceiling']:10.0%} {r['held_gib']:9.2f} "
            f"{r['beyond_gib']:7.2f} {r['activations_gib']:11.2f} "
            f"{r['beyond_gib'] - r['activations_gib']:6.2f}"
        )


def measure(case: Case, row: Row, world: World) -> dict[str, Any]:
    """Return the values of one row of the table."""
    teacher, run = make_models(case, row, world)
    step = step_of(case, row, teacher, run)
    for _ in range(3):
        step()
        run.update()
    _wait()
    held = torch.cuda.memory_allocated() if world.device.type == "cuda" else 0
    if held:
        torch.cuda.reset_peak_memory_stats()
    step()
    beyond = torch.cuda.max_memory_allocated() - held if held else 0
    run.update()
    times, updates = [], []
    for _ in range(case.repeats):
        times.append(_timed(step))
        updates.append(_timed(run.update))
    length = case.sequence_length
    flops = length * (training_flops(case.student, length) + forward_flops(case.teacher, length))
    kept = activation_bytes_per_token(
        case.student,
        ParallelConfig(),
        2,
        transformer_engine=world.device.type == "cuda",
        fp8=bool(row.fp8),
    )
    run.finalize()
    if row.graphs:
        release_cuda_graphs(run.model.chunks)
    return {
        "layers": row.layers,
        "loss": row.loss,
        "step_ms": 1e3 * statistics.median(times),
        "least_ms": 1e3 * min(times),
        "most_ms": 1e3 * max(times),
        "adam_ms": 1e3 * statistics.median(updates),
        "tflops": flops / statistics.median(times) / 1e12,
        "held_gib": held / GIB,
        "beyond_gib": beyond / GIB,
        "activations_gib": case.student.num_layers * length * kept / GIB,
    }


def make_models(case: Case, row: Row, world: World) -> tuple[ColocatedTeacher, TrainingRun]:
    """Return a teacher and a student in training, with random weights."""
    settings = DistillConfig(
        steps=10_000,
        warmup_steps=9_999,  # the learning rate stays small, so that the loss stays finite
        lr=1e-5,
        global_batch_size=1,
        fp8=row.fp8,
        log_interval=10_000,
        checkpoint_interval=10_000,
        logits_precision="bf16" if "bf16 logits" in row.loss else "fp32",
    )
    settings = settings.model_copy(update={"cuda_graphs": row.graphs})
    build: dict[str, Any] = {
        "precision": "bf16",
        "sequence_length": case.sequence_length,
        "random_weights": True,
    }
    teacher_fp8 = "tensorwise" if row.fp8 == "delayed" else row.fp8
    teacher = ColocatedTeacher(build_model(case.teacher, world, ModelOptions(fp8=teacher_fp8, **build)))
    student = build_model(case.student, world, ModelOptions(training=settings, **build))
    manifest = Manifest(stage="distill", settings={}, inputs={})
    return teacher, TrainingRun(student, teacher, settings, RunOptions(None, manifest))


def step_of(case: Case, row: Row, teacher: ColocatedTeacher, run: TrainingRun) -> Callable[[], None]:
    """Return a function that computes the gradients of one step on random tokens."""
    tokens = torch.randint(0, case.student.vocab_size, (1, case.sequence_length + 1))
    batch: Batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": torch.arange(case.sequence_length)[None],
        "loss_mask": torch.ones(1, case.sequence_length),
    }

    def naive(hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict]:
        target = teacher.target(signal_of(batch))
        assert isinstance(target, TeacherHidden)
        with torch.no_grad():
            teacher_logits = logits(teacher.model.last_chunk, target.hidden)
        log_q = F.log_softmax(logits(unwrap(run.model.last_chunk), hidden).float(), -1)
        log_p = F.log_softmax(teacher_logits.float(), -1)
        loss = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        return loss, batch["loss_mask"].sum().int(), {}

    on_output = naive if row.loss == "naive" else None
    return lambda: run.forward_backward(with_signals(teacher, [batch]), on_output)


def ceiling(fp8: str | None, world: World) -> float:
    """Return TFLOP/s of the fastest square matrix product, measured for one second.

    The duration includes the effect of the power limit.
    """
    n = 8192 if world.device.type == "cuda" else 512
    a, b = (torch.randn((n, n), device=world.device, dtype=torch.bfloat16) for _ in range(2))
    if fp8:
        a, b, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=world.device)

        def product():
            return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    else:

        def product():
            return torch.mm(a, b)

    _timed(product)
    count = max(1, int(1.0 / max(_timed(product), 1e-5)))

    def many() -> None:
        for _ in range(count):
            product()

    return 2 * n**3 * count / _timed(many) / 1e12


def _timed(action: Callable[[], Any]) -> float:
    """Seconds on the clock, the device's work included."""
    _wait()
    start = time.perf_counter()
    action()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
