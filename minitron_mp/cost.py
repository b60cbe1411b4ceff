"""What a run needs before it runs: parameters and memory per rank, from sizes alone.

Weights, gradients and optimizer state are exact for this library's layout. Activations and logits are an estimate of the local
layers without recomputation; a run's peak also has the allocator's slack.
"""

from __future__ import annotations

import math

from minitron_mp.arch import AXES, Arch
from minitron_mp.config import Parallel, Recipe

SPLIT_OVER_TP = {"vocab", "qkv", "heads", "gate_up", "ffn"}
BYTES = {"bf16": 2, "fp32": 4}


def stage_layers(num_layers: int, parallel: Parallel) -> list[int]:
    """Layers on each pipeline stage."""
    counts = parallel.layers_of_chunks(num_layers)
    return [sum(counts[stage :: parallel.pp]) for stage in range(parallel.pp)]


def rank_parameters(arch: Arch, parallel: Parallel) -> list[int]:
    """Parameters on one rank of each pipeline stage, vocabulary padding included; tied weights lie on the first and the last."""
    per_layer = first = last = 0
    for key, shape in arch.shapes().items():
        split = parallel.tp if SPLIT_OVER_TP & set(AXES[key]) else 1
        count = math.prod(shape) // split
        if AXES[key][0] == "layer":
            per_layer += count // arch.num_layers
        elif key.startswith("embedding"):
            first += count
        else:
            last += count
    if arch.tied and parallel.pp > 1:
        last += first
    stages = [n * per_layer for n in stage_layers(arch.num_layers, parallel)]
    stages[0] += first
    stages[-1] += last
    return stages


def distill_memory(teacher: Arch, student: Arch, recipe: Recipe, world_size: int) -> dict[str, float]:
    """Bytes on the fullest rank while distilling with a colocated teacher, by part."""
    p, d = recipe.parallel, recipe.distill
    size, shards = BYTES[recipe.precision], max(1, world_size // (p.tp * p.pp))
    sequence = recipe.data.sequence_length // p.cp
    tokens = sequence * d.micro_batch_size
    in_flight = min(p.pp, max(1, d.global_batch_size // d.micro_batch_size))
    student_parameters, teacher_parameters = max(rank_parameters(student, p)), max(rank_parameters(teacher, p))
    main_copy = 4 if recipe.precision == "bf16" else 0
    layers = max(stage_layers(student.num_layers, p))
    along_sequence = p.tp if p.sequence_parallel else 1
    a = student
    # Kept for the backward pass in each layer: norms, residuals and their inputs (6 h), q k v and the attention output with
    # their rotated copies (split over tp), gate, up, their activation and product.
    per_token = 6 * a.hidden_size / along_sequence + (3 * a.axis_size("qkv") + 2 * a.axis_size("heads") + 5 * a.ffn_hidden_size) / p.tp
    per_token = a.hidden_size / along_sequence if d.recompute else per_token
    steps_held = max(1, d.global_batch_size // d.micro_batch_size // max(1, world_size // p.model_ranks))
    return {
        "student weights": size * student_parameters,
        "student gradients (float32)": 4 * student_parameters,
        "optimizer state": (8 + main_copy) * student_parameters / shards,
        "teacher weights": size * teacher_parameters,
        "student activations (estimate)": size * tokens * layers * per_token * in_flight,
        "teacher hidden states of a step": size * tokens * teacher.hidden_size / along_sequence * steps_held,
        "logits and their gradient (estimate)": (3 * size + 4) * tokens * student.padded_vocab_size / p.tp,
    }


def rows(teacher: Arch, student: Arch, recipe: Recipe, world_size: int) -> list[tuple[str, str]]:
    """Lines (what, value) of the dry run."""
    p = recipe.parallel
    dp = world_size // p.model_ranks
    memory = distill_memory(teacher, student, recipe, world_size)
    lines = [
        (
            "ranks",
            f"{world_size} = tp {p.tp} x pp {p.pp} x cp {p.cp} x dp {dp}" + (f", vpp {p.vpp}" if p.vpp else "") + ", sequence parallel" * p.sequence_parallel,
        ),
        ("layers on each stage", f"teacher {stage_layers(teacher.num_layers, p)}, student {stage_layers(student.num_layers, p)}"),
    ]
    for name, arch in (("teacher", teacher), ("student", student)):
        total, outside = arch.num_parameters(), arch.num_parameters(embeddings=False)
        stages = ", ".join(f"{n:,}" for n in rank_parameters(arch, p))
        lines.append((f"{name} parameters", f"{total:,} ({outside:,} without embeddings); on one rank of each stage {stages}"))
    d = recipe.distill
    tokens = d.steps * d.global_batch_size * recipe.data.sequence_length
    lines.append(("distillation", f"{d.steps:,} steps of {d.global_batch_size} samples of {recipe.data.sequence_length} tokens: {tokens:,} tokens"))
    lines += [(f"memory: {part}", f"{num_bytes / 2**30:.2f} GiB") for part, num_bytes in memory.items()]
    lines.append(("memory: sum on the fullest rank", f"{sum(memory.values()) / 2**30:.2f} GiB"))
    return lines
