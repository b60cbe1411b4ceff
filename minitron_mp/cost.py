"""What a run needs before it runs: parameters and memory per rank, from sizes alone.

Weights, gradients and optimizer state are exact for this library's layout. Activations and logits are an estimate of the local
layers without recomputation; a run's peak also has the allocator's slack.
"""

from __future__ import annotations

import math

from minitron_mp.arch import AXES, Arch
from minitron_mp.config import Parallel, Recipe, Training

SPLIT_OVER_TP = {"vocab", "qkv", "heads", "gate_up", "ffn"}
BYTES = {"bf16": 2, "fp32": 4}
CHUNK_LOGITS, BLOCK_LOGITS = 1 << 26, 1 << 28
"""losses.ELEMENTS of a GPU."""


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


def payload_bytes_per_token(teacher: Arch, recipe: Recipe) -> int:
    """What a remote teacher sends for a token, over all its ranks; stream.py counts the same."""
    t = recipe.teacher
    element = BYTES[recipe.teacher_precision]
    hidden = element * teacher.hidden_size * (1 + (len(states.layers) if (states := recipe.distill.states) else 0))
    return {"hidden": hidden, "logits": element * teacher.padded_vocab_size, "topk": 4 * (2 * t.top_k + 1)}[t.payload]


def training_memory(arch: Arch, training: Training, recipe: Recipe, ranks: int, precision: str | None = None) -> dict[str, float]:
    """Bytes of a model in training on its fullest rank, by part. ranks: that train it. precision: default the recipe's."""
    precision = precision or recipe.precision
    p, size = recipe.parallel, BYTES[precision]
    tokens = recipe.data.sequence_length // p.cp * training.micro_batch_size
    in_flight = min(p.pp, max(1, training.global_batch_size // training.micro_batch_size))
    parameters, main_copy = max(rank_parameters(arch, p)), 4 if precision == "bf16" else 0
    along_sequence = p.tp if p.sequence_parallel else 1
    # Kept for the backward pass in each layer: norms, residuals and their inputs (6 h), q k v and the attention output with
    # their rotated copies (split over tp), gate, up, their activation and product.
    per_token = 6 * arch.hidden_size / along_sequence + (3 * arch.axis_size("qkv") + 2 * arch.axis_size("heads") + 5 * arch.ffn_hidden_size) / p.tp
    per_token = arch.hidden_size / along_sequence if training.recompute else per_token
    # In chunks (losses.py): float32 logits of both models and the gradient of a block.
    columns = arch.padded_vocab_size / p.tp
    logits = min(tokens * columns, CHUNK_LOGITS) * 2 * BYTES[training.logits_precision] + min(tokens * columns, BLOCK_LOGITS) * size
    return {
        "weights": size * parameters,
        "gradients (float32)": 4 * parameters,
        "optimizer state": (8 + main_copy) * parameters / max(1, ranks // (p.tp * p.pp)),
        "activations (estimate)": size * tokens * max(stage_layers(arch.num_layers, p)) * per_token * in_flight,
        "logits and their gradient": logits,
    }


def states_memory(teacher: Arch, student: Arch, recipe: Recipe, student_ranks: int) -> dict[str, float]:
    """Bytes that matching states takes on the rank with the most pairs, by part; {} without."""
    p, d, states = recipe.parallel, recipe.distill, recipe.distill.states
    if states is None:
        return {}
    pairs = max(sum(block > 0 for block in blocks) for blocks in states.blocks(student.num_layers, p).values())
    batches = max(1, d.global_batch_size // d.micro_batch_size // max(1, student_ranks // p.model_ranks))
    tokens = recipe.data.sequence_length // p.cp * d.micro_batch_size / (p.tp if p.sequence_parallel else 1)
    projection = 16 * teacher.hidden_size * student.hidden_size if teacher.hidden_size != student.hidden_size else 0
    held = {} if recipe.teacher.is_remote else {"teacher states of a step": BYTES[recipe.teacher_precision] * tokens * teacher.hidden_size * pairs * batches}
    return {
        **held,
        "gradients of states": BYTES[recipe.precision] * tokens * student.hidden_size * pairs * min(p.pp, batches),
        "up-projection of states": projection,
    }


def teacher_memory(teacher: Arch, recipe: Recipe, student_ranks: int, teacher_ranks: int) -> dict[str, float]:
    """Bytes that the teacher takes on the student's fullest rank while distilling, by part."""
    head = BYTES[recipe.teacher_precision] * teacher.padded_vocab_size * teacher.hidden_size / recipe.parallel.tp
    p, d, t = recipe.parallel, recipe.distill, recipe.teacher
    size, sequence = BYTES[recipe.teacher_precision], recipe.data.sequence_length // p.cp
    tokens = sequence * d.micro_batch_size
    copy = {"teacher's output layer (a copy)": head if t.payload == "hidden" else 0}
    signal = tokens * payload_bytes_per_token(teacher, recipe) / (p.tp if t.payload == "logits" or sequence % p.tp == 0 else 1)
    if t.placement == "cached":
        return {**copy, "teacher signal": signal}
    if t.is_remote:  # a window for each copy of the teacher that this copy of the student hears, and what is in use
        copies, in_use = teacher_ranks // t.parallel.model_ranks, p.interleaved if d.states else 1
        return {**copy, "teacher signals in the window": signal * (t.window * copies // math.gcd(copies, student_ranks // p.model_ranks) + in_use)}
    steps_held = max(1, d.global_batch_size // d.micro_batch_size // max(1, student_ranks // p.model_ranks))
    weights: dict[str, float] = {"teacher weights": size * max(rank_parameters(teacher, p))}
    if recipe.correct and recipe.corrects_meanwhile:
        weights = {
            f"teacher, {part}": value for part, value in training_memory(teacher, recipe.correct, recipe, student_ranks, recipe.teacher_precision).items()
        }
    return {
        **weights,
        "teacher hidden states of a step": size * tokens * teacher.hidden_size / (p.tp if p.sequence_parallel else 1) * steps_held,
    }


def rows(base: Arch, teacher: Arch, student: Arch, recipe: Recipe, world_size: int) -> list[tuple[str, str]]:
    """Lines (what, value) of the dry run. base: what is cut; teacher: what is distilled from."""
    d, t = recipe.distill, recipe.teacher
    teachers = t.ranks_in(world_size)
    students = world_size - teachers - sum(t.siblings.values())
    memory = {
        **training_memory(student, d, recipe, students),
        **teacher_memory(teacher, recipe, students, teachers),
        **states_memory(teacher, student, recipe, students),
    }
    teacher_layout = t.parallel if t.is_remote else recipe.parallel
    lines = [("ranks", _layout(students, recipe.parallel))]
    if t.is_remote:
        lines.append(("ranks of the teacher", _layout(teachers, t.parallel)))
        per_token = payload_bytes_per_token(teacher, recipe)
        payload = t.payload + (" and states" if d.states else "")
        lines.append(("teacher stream", f"{payload}, {per_token:,} bytes a token, {per_token * d.global_batch_size * recipe.data.sequence_length:,} a step"))
    models = [("teacher", teacher, teacher_layout), *([("unpruned", base, recipe.parallel)] if base != teacher else []), ("student", student, recipe.parallel)]
    for name, arch, p in models:
        total, outside = arch.num_parameters(), arch.num_parameters(embeddings=False)
        stages = ", ".join(f"{n:,}" for n in rank_parameters(arch, p))
        lines.append((f"layers of the {name} on each stage", str(stage_layers(arch.num_layers, p))))
        lines.append((f"{name} parameters", f"{total:,} ({outside:,} without embeddings); on one rank of each stage {stages}"))
    tokens = d.steps * d.global_batch_size * recipe.data.sequence_length
    lines.append(("distillation", f"{d.steps:,} steps of {d.global_batch_size} samples of {recipe.data.sequence_length} tokens: {tokens:,} tokens"))
    lines += [(f"memory: {part}", f"{num_bytes / 2**30:.2f} GiB") for part, num_bytes in memory.items()]
    lines.append(("memory: sum on the fullest rank", f"{sum(memory.values()) / 2**30:.2f} GiB"))
    if recipe.correct and not recipe.corrects_meanwhile:
        needed = sum(training_memory(base, recipe.correct, recipe, students).values())
        lines.append(("memory while the teacher is corrected", f"{needed / 2**30:.2f} GiB"))
    if recipe.search:
        together = min(recipe.search.together or recipe.search.finalists, recipe.search.finalists)
        needed = together * sum(training_memory(student, d, recipe, students).values()) + BYTES[recipe.teacher_precision] * max(
            rank_parameters(teacher, recipe.parallel)
        )
        lines.append((f"memory while the search distils {together} students", f"{needed / 2**30:.2f} GiB"))
    return lines


def _layout(ranks: int, p: Parallel) -> str:
    parts = f"{ranks} = tp {p.tp} x pp {p.pp} x cp {p.cp} x dp {ranks // p.model_ranks}"
    return parts + (f", vpp {p.vpp}" if p.vpp else "") + ", sequence parallel" * p.sequence_parallel
