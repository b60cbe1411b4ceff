"""What a run needs before it runs: parameters and memory per rank, from sizes alone.

Weights, gradients and optimizer state are exact for this library's layout, and so is the number of layers in flight. Bytes of activations are
counted tensor by tensor (kept_per_token); a run's peak also has the allocator's slack.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence

from minitron_mp.config.base import Section
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.distributed.layout import layers_of_stages, stage_layers
from minitron_mp.models.arch import Arch, BlockArch
from minitron_mp.models.blocks.dense import PARAMETERS
from minitron_mp.models.flops import matrix_elements
from minitron_mp.models.number_formats import BYTES

SPLIT_OVER_TP = {"vocab", "qkv", "heads", "gate_up", "ffn"}

CHUNK_LOGITS, BLOCK_LOGITS = 1 << 26, 1 << 28
"""losses.ELEMENTS of a GPU."""


def rank_parameters(arch: Arch, parallel: ParallelConfig) -> list[int]:
    """Parameters on one rank of each pipeline stage, vocabulary padding included; tied weights lie on the first and the last."""
    return list(_rank_parameters(arch, parallel))


@functools.lru_cache(maxsize=4096)
def _rank_parameters(arch: Arch, parallel: ParallelConfig) -> list[int]:
    vocabulary = arch.padded_vocab_size * arch.hidden_size // parallel.tp
    stages = [
        sum(count * _block_parameters(arch, block, parallel.tp) for block, count in Counter(blocks).items())
        for blocks in _blocks_of_stages(arch, parallel)
    ]
    stages[0] += vocabulary
    stages[-1] += (2 if arch.norm_has_bias else 1) * arch.hidden_size
    if parallel.pp > 1 or not arch.tied:
        stages[-1] += vocabulary
    return stages


@functools.lru_cache(maxsize=4096)
def _block_parameters(arch: Arch, block: BlockArch, tp: int) -> int:
    return sum(
        math.prod(shape) // (tp if SPLIT_OVER_TP & set(PARAMETERS[name]) else 1)
        for name, shape in arch.block_shapes(block).items()
    )


@functools.lru_cache(maxsize=4096)
def _blocks_of_stages(arch: Arch, parallel: ParallelConfig) -> list[list[BlockArch]]:
    """Sizes of the layers on each pipeline stage."""
    stages = layers_of_stages(arch.num_layers, parallel)
    return [[arch.blocks[layer] for layer in layers] for layers in stages]


def _mean_over_layers(arch: Arch, blocks: list[BlockArch], value: Callable[[Arch], float]) -> float:
    """Mean over these layers of a value of a model whose layers are all like the one layer."""
    values = {block: value(arch.with_block(block)) for block in set(blocks)}
    if len(values) == 1:
        return values[blocks[0]]
    return sum(values[block] for block in blocks) / len(blocks)


def payload_bytes_per_token(teacher: Arch, recipe: Recipe) -> int:
    """What a remote teacher sends for a token, over all its ranks; stream.py counts the same."""
    t = recipe.teacher
    element = BYTES[recipe.teacher_precision]
    hidden = (
        element * teacher.hidden_size * (1 + (len(states.layers) if (states := recipe.distill.states) else 0))
    )
    return {"hidden": hidden, "logits": element * teacher.padded_vocab_size, "topk": 4 * (2 * t.top_k + 1)}[
        t.payload
    ]


def fp8_of(section: Section) -> str | None:
    """The FP8 recipe of a section that has such a key; None for bf16 and float32."""
    return vars(section).get("fp8")


def uses_transformer_engine(recipe: Recipe) -> bool:
    """Whether a GPU with Transformer Engine gets its layers; the local layers otherwise."""
    chosen = vars(recipe).get("transformer_impl", "local")
    return chosen == "transformer_engine" or (chosen == "auto" and recipe.precision == "bf16")


@functools.lru_cache(maxsize=4096)
def layers_in_flight(num_layers: int, parallel: ParallelConfig, num_microbatches: int, stage: int) -> int:
    """Most (layer, microbatch) pairs of a stage whose activations wait for their backward pass at one time.

    Megatron's schedules: pp - stage - 1 forward passes before the first backward one (arXiv 2104.04473); interleaved, twice as many and
    pp for each model chunk but one, the chunks in turn for pp microbatches each.
    """
    p, layers = parallel, parallel.layers_of_chunks(num_layers)[stage :: parallel.pp]
    if not p.vpp:
        return layers[0] * min(p.pp - stage, num_microbatches)
    shown = min(num_microbatches, 4 * p.pp)  # the pattern repeats
    order = [chunk for _ in range(shown // p.pp) for chunk in range(p.vpp) for _ in range(p.pp)]
    warm_up = min(len(order), 2 * (p.pp - stage - 1) + (p.vpp - 1) * p.pp)
    held = peak = sum(layers[chunk] for chunk in order[:warm_up])
    for forward, backward in zip(order[warm_up:], order):
        held += layers[forward]
        peak = max(peak, held)
        held -= layers[p.vpp - 1 - backward]
    return peak


def kept_per_token(
    arch: Arch, parallel: ParallelConfig, size: int, *, transformer_engine: bool = False, fp8: bool = False
) -> float:
    """Bytes on one rank that a layer's forward pass keeps for its backward pass, a token. size: bytes of a value.

    Local layers: input and output of both norms; q, k, v as one product (v is a view of it), rotated q and k, the attention's output; the MLP's
    product, and with a gate its activation, the other half and their product. Transformer Engine keeps no rotated copy beside q, k, v and
    fuses the gate; in FP8 what only the products read has a byte. Sequence parallelism splits what is h wide, tensor parallelism the rest.
    """
    tp, along, act = parallel.tp, parallel.tp if parallel.sequence_parallel else 1, 1 if fp8 else size
    heads, qkv, ffn = arch.dim_size("heads"), arch.dim_size("qkv"), arch.ffn_hidden_size
    key = (qkv - heads) // 2
    statistics = 4 * arch.num_attention_heads / tp
    if transformer_engine:
        inner = size * (qkv + heads + arch.dim_size("gate_up")) + act * ffn + (heads if fp8 else 0)
        return 2 * arch.hidden_size * (size + act) / along + inner / tp + statistics
    # Under context parallelism keys and values of the whole sequence, in place of the product's (and a mask, [s/cp, s], which is left out).
    attention = 2 * heads + (2 * key * parallel.cp if parallel.cp > 1 else qkv + key)
    copied = (
        heads if arch.qk_norm and arch.num_query_groups > tp else 0
    )  # by the norm; with one group q, too, is a view
    inner = attention + copied + (5 if arch.gated else 2) * ffn
    return size * (4 * arch.hidden_size / along + inner / tp) + statistics


def training_memory(
    arch: Arch, training: TrainingConfig, recipe: Recipe, ranks: int, stage: int, precision: str | None = None
) -> dict[str, float]:
    """Bytes of a model in training on a rank of this pipeline stage, by part. ranks: that train it. precision: default the recipe's."""
    precision = precision or recipe.precision
    p, size, fp8, last = (
        recipe.parallel,
        BYTES[precision],
        fp8_of(training) is not None,
        stage == recipe.parallel.pp - 1,
    )
    tokens, along = (
        recipe.data.sequence_length // p.cp * training.micro_batch_size,
        p.tp if p.sequence_parallel else 1,
    )
    batches = max(
        1, training.global_batch_size // training.micro_batch_size // max(1, ranks // p.model_ranks)
    )
    parameters, main_copy = rank_parameters(arch, p)[stage], 4 if precision == "bf16" else 0
    layers = layers_in_flight(arch.num_layers, p, batches, stage)
    blocks = _blocks_of_stages(arch, p)[stage]
    engine = uses_transformer_engine(recipe)

    def layer_bytes(like: Arch) -> float:
        return kept_per_token(like, p, size, transformer_engine=engine, fp8=fp8)

    layer = _mean_over_layers(arch, blocks, layer_bytes)
    largest = max(layer_bytes(arch.with_block(block)) for block in set(blocks))
    kept = layers * (size * arch.hidden_size / along if training.recompute else layer)
    # Recomputed layers exist whole, one at a time. The last stage keeps input and output of the final norm.
    kept += largest * training.recompute + 2 * size * arch.hidden_size / along * last
    # Of one layer's backward pass: gradients around the MLP, and what sequence parallelism gathers.
    mlp = max(arch.dim_size("gate_up", block) + block.ffn_hidden_size for block in blocks)
    working = mlp / p.tp + (2 + (along > 1)) * arch.hidden_size
    parts = {
        "weights": size * parameters,
        "gradients (float32)": 4 * parameters,
        "optimizer state": (8 + main_copy) * parameters / max(1, ranks // (p.tp * p.pp)),
        "activations (estimate)": tokens * kept,
        "working buffers (estimate)": size * tokens * working,
    }
    if fp8:  # for the products, as they are and transposed
        parts["FP8 copies of weights"] = 2 * _matrices(arch, blocks) / p.tp
    if last:  # In chunks (losses.py): float32 logits of both models, the gradient of a block, and what is gathered along the sequence
        logits = tokens * arch.padded_vocab_size / p.tp
        chunks = (
            min(logits, CHUNK_LOGITS) * 2 * BYTES[training.logits_precision]
            + min(logits, BLOCK_LOGITS) * size
        )
        parts["logits and their gradient"] = chunks + 2 * size * tokens * arch.hidden_size
    return parts


def _matrices(arch: Arch, blocks: list[BlockArch]) -> int:
    """Elements of the weight matrices of these layers."""
    return sum(count * matrix_elements(arch, block) for block, count in Counter(blocks).items())


def fullest(memories: Sequence[dict[str, float]]) -> dict[str, float]:
    """The stage that needs the most."""
    return max(memories, key=lambda parts: sum(parts.values()))


def states_memory(
    teacher: Arch, student: Arch, recipe: Recipe, student_ranks: int, stage: int
) -> dict[str, float]:
    """Bytes that matching states takes on a rank of this stage, by part; {} without."""
    p, d, states = recipe.parallel, recipe.distill, recipe.distill.states
    if states is None:
        return {}
    pairs = sum(block > 0 for block in states.blocks(student.num_layers, p).get(stage, []))
    batches = max(1, d.global_batch_size // d.micro_batch_size // max(1, student_ranks // p.model_ranks))
    tokens = recipe.data.sequence_length // p.cp * d.micro_batch_size / (p.tp if p.sequence_parallel else 1)
    projection = (
        16 * teacher.hidden_size * student.hidden_size if teacher.hidden_size != student.hidden_size else 0
    )
    held = (
        {}
        if recipe.teacher.is_remote
        else {
            "teacher states of a step": BYTES[recipe.teacher_precision]
            * tokens
            * teacher.hidden_size
            * pairs
            * batches
        }
    )
    return {
        **held,
        "gradients of states": BYTES[recipe.precision]
        * tokens
        * student.hidden_size
        * pairs
        * min(p.pp - stage, batches),
        "up-projection of states": projection,
    }


def teacher_memory(
    teacher: Arch, recipe: Recipe, student_ranks: int, teacher_ranks: int, stage: int
) -> dict[str, float]:
    """Bytes that the teacher takes on a rank of this stage of the student while distilling, by part."""
    p, d, t, last = recipe.parallel, recipe.distill, recipe.teacher, stage == recipe.parallel.pp - 1
    size, sequence = BYTES[recipe.teacher_precision], recipe.data.sequence_length // p.cp
    tokens = sequence * d.micro_batch_size
    if t.placement != "colocated":
        if not last:
            return {}
        head = size * teacher.padded_vocab_size * teacher.hidden_size / p.tp
        copy = {"teacher's output layer (a copy)": head if t.payload == "hidden" else 0}
        signal = (
            tokens
            * payload_bytes_per_token(teacher, recipe)
            / (p.tp if t.payload == "logits" or sequence % p.tp == 0 else 1)
        )
        if t.placement == "cached":
            return {**copy, "teacher signal": signal}
        # a window for each copy of the teacher that this copy of the student hears, and what is in use
        copies, in_use = teacher_ranks // t.parallel.model_ranks, p.interleaved if d.states else 1
        heard = copies // math.gcd(copies, max(1, student_ranks // p.model_ranks)) if copies else 1
        return {**copy, "teacher signals in the window": signal * (t.window * heard + in_use)}
    if recipe.correct and recipe.corrects_meanwhile:
        parts = training_memory(
            teacher, recipe.correct, recipe, student_ranks, stage, recipe.teacher_precision
        )
        held = {f"teacher, {part}": value for part, value in parts.items()}
    else:
        held = {"teacher weights": teacher_weights(teacher, recipe, p, stage)}
    if last:
        steps_held = max(
            1, d.global_batch_size // d.micro_batch_size // max(1, student_ranks // p.model_ranks)
        )
        held["teacher hidden states of a step"] = (
            size * tokens * teacher.hidden_size / (p.tp if p.sequence_parallel else 1) * steps_held
        )
    return held


def teacher_weights(teacher: Arch, recipe: Recipe, parallel: ParallelConfig, stage: int) -> float:
    """Bytes of a frozen teacher's weights on a rank of a stage; in FP8 a layer's products have one: without gradients none is kept transposed."""
    blocks = _blocks_of_stages(teacher, parallel)[stage]
    matrices = _matrices(teacher, blocks) / parallel.tp if fp8_of(recipe.teacher) else 0
    return BYTES[recipe.teacher_precision] * (rank_parameters(teacher, parallel)[stage] - matrices) + matrices


def remote_teacher_memory(teacher: Arch, recipe: Recipe, stage: int) -> dict[str, float]:
    """Bytes on a rank of a remote teacher's stage, by part: no gradients, one layer's forward pass at a time."""
    p, d, size = recipe.teacher.parallel, recipe.distill, BYTES[recipe.teacher_precision]
    tokens, last = recipe.data.sequence_length // p.cp * d.micro_batch_size, stage == p.pp - 1
    engine, fp8 = uses_transformer_engine(recipe), fp8_of(recipe.teacher) is not None
    layer = max(
        kept_per_token(teacher.with_block(block), p, size, transformer_engine=engine, fp8=fp8)
        for block in set(teacher.blocks)
    )
    signal = tokens * payload_bytes_per_token(teacher, recipe) / p.tp
    return {
        "teacher weights": teacher_weights(teacher, recipe, p, stage),
        "working buffers (estimate)": tokens * layer
        + size * tokens * teacher.hidden_size * (1 + p.pp * (p.pp > 1)),
        "teacher signals in the window": signal * (recipe.teacher.window + 1) * last,
    }


def distilling_memory(
    student: Arch, teacher: Arch, recipe: Recipe, students: int, teachers: int
) -> list[dict[str, float]]:
    """Bytes on a rank of each pipeline stage of the student, by part."""
    return [
        {
            **training_memory(student, recipe.distill, recipe, students, stage),
            **teacher_memory(teacher, recipe, students, teachers, stage),
            **states_memory(teacher, student, recipe, students, stage),
        }
        for stage in range(recipe.parallel.pp)
    ]


def memory_rows(
    base: Arch, teacher: Arch, student: Arch, recipe: Recipe, world_size: int
) -> list[tuple[str, str]]:
    """Lines (what, value) of the dry run. base: what is cut; teacher: what is distilled from."""
    d, t = recipe.distill, recipe.teacher
    teachers = t.ranks_in(world_size)
    students = world_size - teachers - sum(t.siblings.values())
    memory = fullest(distilling_memory(student, teacher, recipe, students, teachers))
    teacher_layout = t.parallel if t.is_remote else recipe.parallel
    lines = [("ranks", _layout(students, recipe.parallel))]
    if t.is_remote:
        lines.append(("ranks of the teacher", _layout(teachers, t.parallel)))
        per_token = payload_bytes_per_token(teacher, recipe)
        payload = t.payload + (" and states" if d.states else "")
        lines.append(
            (
                "teacher stream",
                f"{payload}, {per_token:,} bytes a token, {per_token * d.global_batch_size * recipe.data.sequence_length:,} a step",
            )
        )
    models = [
        ("teacher", teacher, teacher_layout),
        *([("unpruned", base, recipe.parallel)] if base != teacher else []),
        ("student", student, recipe.parallel),
    ]
    for name, arch, p in models:
        total, outside = arch.num_parameters(), arch.num_parameters(embeddings=False)
        stages = ", ".join(f"{n:,}" for n in rank_parameters(arch, p))
        lines.append((f"layers of the {name} on each stage", str(stage_layers(arch.num_layers, p))))
        lines.append(
            (
                f"{name} parameters",
                f"{total:,} ({outside:,} without embeddings); on one rank of each stage {stages}",
            )
        )
    tokens = d.steps * d.global_batch_size * recipe.data.sequence_length
    lines.append(
        (
            "distillation",
            f"{d.steps:,} steps of {d.global_batch_size} samples of {recipe.data.sequence_length} tokens: {tokens:,} tokens",
        )
    )
    lines += [(f"memory: {part}", f"{num_bytes / 2**30:.2f} GiB") for part, num_bytes in memory.items()]
    lines.append(("memory: sum on the fullest rank", f"{sum(memory.values()) / 2**30:.2f} GiB"))
    if recipe.correct and not recipe.corrects_meanwhile:
        needed = _training_peak(base, recipe.correct, recipe, students)
        lines.append(("memory while the teacher is corrected", f"{needed / 2**30:.2f} GiB"))
    if recipe.search:
        together = min(recipe.search.together or recipe.search.finalists, recipe.search.finalists)
        needed = together * _training_peak(student, d, recipe, students) + BYTES[
            recipe.teacher_precision
        ] * max(rank_parameters(teacher, recipe.parallel))
        lines.append((f"memory while the search distils {together} students", f"{needed / 2**30:.2f} GiB"))
    return lines


def _training_peak(arch: Arch, training: TrainingConfig, recipe: Recipe, ranks: int) -> float:
    return sum(
        fullest(
            [training_memory(arch, training, recipe, ranks, stage) for stage in range(recipe.parallel.pp)]
        ).values()
    )


def _layout(ranks: int, p: ParallelConfig) -> str:
    parts = f"{ranks} = tp {p.tp} x pp {p.pp} x cp {p.cp} x dp {ranks // p.model_ranks}"
    return parts + (f", vpp {p.vpp}" if p.vpp else "") + ", sequence parallel" * p.sequence_parallel
