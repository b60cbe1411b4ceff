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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distillation.frozen_model import freeze
from minitron_mp.distillation.teacher import ColocatedTeacher, signal_of, with_signals
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.world import World, join_world
from minitron_mp.errors import InputError
from minitron_mp.losses.fused import TeacherHidden
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import build_model, logits
from minitron_mp.models.flops import forward_flops, training_flops
from minitron_mp.models.hf_config import read_arch
from minitron_mp.models.precision import engine_version, forget_cuda_graphs
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.planning.activations import activation_bytes_per_token
from minitron_mp.training.run import TrainingRun

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
SMALL = {
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 32,
    "vocab_size": 1024,
}
GIB = 2**30


def main() -> None:
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
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    on_gpu = torch.cuda.is_available()
    sequence = args.sequence_length or (8192 if on_gpu else 64)
    teacher = read_arch(CONFIGS / "mistral_nemo_12b", weights=False).resized(num_layers=args.layers)
    student = teacher.resized(hidden_size=4096, ffn_hidden_size=11520)
    if not on_gpu:
        teacher, student = (
            teacher.model_copy(update=SMALL),
            student.resized(**SMALL, hidden_size=96, ffn_hidden_size=192),
        )
    with join_world(ParallelConfig(), seed=1) as world:
        ceilings = {
            "bf16": ceiling(None, world),
            **({"fp8": ceiling("fp8", world)} if on_gpu and args.fp8 else {}),
        }
        rows = []
        for fp8 in [None, *(args.fp8 if on_gpu else [])]:
            for loss, graphs in itertools.product(
                ("naive", "ours", "ours, bf16 logits"), (False, True)[: 1 + args.cuda_graphs]
            ):
                try:
                    row = measure(teacher, student, sequence, fp8, loss, graphs, world, args.repeats)
                except (torch.OutOfMemoryError, InputError) as problem:
                    print(
                        f"{fp8 or 'bf16'}, {loss}{', graphs' if graphs else ''}: does not run: "
                        f"{str(problem).splitlines()[0][:100]}"
                    )
                    continue
                row["of_ceiling"] = row["tflops"] / ceilings["fp8" if fp8 else "bf16"]
                rows.append(row)
                _collect()
    found = {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformer_engine": engine_version(),
        "date": time.strftime("%Y-%m-%d"),
        "sizes": {
            "layers": [args.layers, args.layers],
            "sequence_length": sequence,
            "teacher": teacher.model_dump(),
            "student": student.model_dump(),
        },
        "ceilings_tflops": ceilings,
        "rows": rows,
    }
    engine = f"Transformer Engine {found['transformer_engine']}"
    print(
        f"{found['device']}, torch {torch.__version__}, {engine}, "
        f"{args.layers} + {args.layers} layers, {sequence} tokens"
    )
    print(
        "fastest matrix product, TFLOP/s: "
        + ", ".join(f"{name} {value:.3g}" for name, value in ceilings.items())
    )
    print(
        f"{'layers':18} {'loss':18} {'step ms':>8} {'least':>8} {'most':>8} {'adam ms':>8} "
        f"{'TFLOP/s':>8} {'of ceiling':>10} {'held GiB':>9} {'beyond':>7} {'activations':>11} {'rest':>6}"
    )
    for r in rows:
        print(
            f"{r['layers']:18} {r['loss']:18} {r['step_ms']:8.1f} {r['least_ms']:8.1f} {r['most_ms']:8.1f} "
            f"{r['adam_ms']:8.1f} {r['tflops']:8.3g} {r['of_ceiling']:10.0%} {r['held_gib']:9.2f} "
            f"{r['beyond_gib']:7.2f} {r['activations_gib']:11.2f} "
            f"{r['beyond_gib'] - r['activations_gib']:6.2f}"
        )
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(
    teacher_arch: Arch,
    arch: Arch,
    sequence: int,
    fp8: str | None,
    loss: str,
    graphs: bool,
    world: World,
    repeats: int,
) -> dict[str, Any]:
    """One row of the table."""
    build: dict[str, Any] = {"precision": "bf16", "sequence_length": sequence}
    # Few warm-up steps, because the loss only has to stay finite.
    settings = DistillConfig(
        steps=10_000,
        warmup_steps=9_999,
        lr=1e-5,
        global_batch_size=1,
        fp8=fp8,
        log_interval=10_000,
        checkpoint_interval=10_000,
    )
    settings = settings.model_copy(update={"cuda_graphs": graphs})
    if "bf16 logits" in loss:
        settings = settings.model_copy(update={"logits_precision": "bf16"})
    teacher_fp8 = "tensorwise" if fp8 == "delayed" else fp8
    teacher_chunks = build_model(teacher_arch, world, random_weights=True, fp8=teacher_fp8, **build)
    freeze(teacher_chunks)
    teacher = ColocatedTeacher(ShardedModel(teacher_chunks, teacher_arch, world, sequence, "bf16"))
    chunks = build_model(arch, world, training=settings, random_weights=True, **build)
    student = TrainingRun(
        chunks,
        teacher,
        settings,
        world,
        vocab_size=arch.vocab_size,
        checkpoints=None,
        manifest=Manifest(stage="distill", settings={}, inputs={}),
    )
    tokens = torch.randint(0, arch.vocab_size, (1, sequence + 1))
    positions = torch.arange(sequence)[None]
    batch: Batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": positions,
        "loss_mask": torch.ones(1, sequence),
    }

    def naive(hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict]:
        target = teacher.target(signal_of(batch))
        assert isinstance(target, TeacherHidden)
        with torch.no_grad():
            wanted = logits(teacher.chunks[-1], target.hidden)
        log_q, log_p = (
            F.log_softmax(logits(chunks[-1], hidden).float(), -1),
            F.log_softmax(wanted.float(), -1),
        )
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum"), batch["loss_mask"].sum().int(), {}

    def step() -> None:
        student.accumulate(with_signals(teacher, [batch]), naive if loss == "naive" else student.loss)

    for _ in range(3):
        step()
        student.update()
    _wait()
    held = torch.cuda.memory_allocated() if world.device.type == "cuda" else 0
    if held:
        torch.cuda.reset_peak_memory_stats()
    step()
    beyond = torch.cuda.max_memory_allocated() - held if held else 0
    student.update()
    times, updates = [], []
    for _ in range(repeats):
        times.append(_timed(step))
        updates.append(_timed(student.update))
    flops = sequence * (training_flops(arch, sequence) + forward_flops(teacher_arch, sequence))
    kept = activation_bytes_per_token(
        arch, ParallelConfig(), 2, transformer_engine=world.device.type == "cuda", fp8=bool(fp8)
    )
    student.settle()
    if graphs:
        forget_cuda_graphs(chunks)
    return {
        "layers": f"{fp8 or 'bf16'}{', graphs' * graphs}",
        "loss": loss,
        "step_ms": 1e3 * statistics.median(times),
        "least_ms": 1e3 * min(times),
        "most_ms": 1e3 * max(times),
        "adam_ms": 1e3 * statistics.median(updates),
        "tflops": flops / statistics.median(times) / 1e12,
        "held_gib": held / GIB,
        "beyond_gib": beyond / GIB,
        "activations_gib": arch.num_layers * sequence * kept / GIB,
    }


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
