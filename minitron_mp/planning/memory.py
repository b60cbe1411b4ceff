"""Memory per GPU and parameters per rank, computed from sizes.

Weights, gradients and optimizer state are exact for this library's layout, and so is the number of
layers in flight. Activations are counted tensor by tensor (activations.py). Measured peaks are
higher by the fragmentation of the allocator.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.losses.tile_sizes import TILE_SIZES
from minitron_mp.models.arch import Arch, BlockArch
from minitron_mp.models.axes import AXIS_OF_DIM
from minitron_mp.models.blocks.dense import PARAMETERS
from minitron_mp.models.flops import matrix_elements
from minitron_mp.models.number_formats import BYTES
from minitron_mp.planning.activations import activation_bytes_per_token, layers_in_flight
from minitron_mp.planning.case import PlanningCase, microbatches_per_replica
from minitron_mp.planning.stages import mean_over_layers, stage_blocks

GIB = 2**30

Parts = dict[str, float]
"""Bytes, or seconds, by part."""

SPLIT_OVER_TP = {"vocab"} | {dim for dim, axis in AXIS_OF_DIM.items() if axis.split_over_tp}
"""Dimensions of weights that tensor parallelism splits."""


def rank_parameters(arch: Arch, parallel: ParallelConfig) -> list[int]:
    """Return the parameters on one rank of each pipeline stage, with vocabulary padding.

    Tied embeddings are stored on the first and on the last stage.
    """
    return list(_rank_parameters(arch, parallel))


@functools.lru_cache(maxsize=4096)
def _rank_parameters(arch: Arch, parallel: ParallelConfig) -> list[int]:
    vocabulary = arch.padded_vocab_size * arch.hidden_size // parallel.tp
    stages = [
        sum(count * _layer_parameters(arch, block, parallel.tp) for block, count in blocks.items())
        for blocks in stage_blocks(arch, parallel)
    ]
    stages[0] += vocabulary
    stages[-1] += (2 if arch.norm_has_bias else 1) * arch.hidden_size
    if parallel.pp > 1 or not arch.tied:
        stages[-1] += vocabulary
    return stages


def _layer_parameters(arch: Arch, block: BlockArch, tp: int) -> int:
    """Return the parameters of a layer of these sizes on one tensor-parallel rank."""
    return sum(
        math.prod(shape) // (tp if SPLIT_OVER_TP & set(PARAMETERS[name]) else 1)
        for name, shape in arch.block_shapes(block).items()
    )


def payload_bytes_per_token(teacher: Arch, recipe: Recipe) -> int:
    """Return the bytes per token that a remote teacher sends, over all its ranks.

    distillation/stream.py counts the same bytes.
    """
    element = BYTES[recipe.teacher_precision]
    if recipe.teacher.payload == "logits":
        return element * teacher.padded_vocab_size
    if recipe.teacher.payload == "topk":
        return 4 * (2 * recipe.teacher.top_k + 1)
    pairs = len(recipe.distill.states.layers) if recipe.distill.states else 0
    return element * teacher.hidden_size * (1 + pairs)


def uses_transformer_engine(recipe: Recipe) -> bool:
    """Return whether the model has Transformer Engine layers; otherwise it has local layers."""
    if recipe.transformer_impl == "auto":
        return recipe.precision == "bf16"
    return recipe.transformer_impl == "transformer_engine"


def training_memory(
    arch: Arch, training: TrainingConfig, recipe: Recipe, ranks: int, stage: int, precision: str | None = None
) -> Parts:
    """Return the bytes by part of a model in training on a rank of a pipeline stage.

    ranks: number of ranks that train this model. precision: of the weights; default: the recipe's.
    """
    precision = precision or recipe.precision
    p = recipe.parallel
    size = BYTES[precision]
    fp8 = training.fp8 is not None
    is_last = stage == p.pp - 1
    tokens = recipe.data.sequence_length // p.cp * training.micro_batch_size
    sequence_split = p.tp if p.sequence_parallel else 1
    parameters = rank_parameters(arch, p)[stage]
    main_copy_bytes = 4 if precision == "bf16" else 0
    gradient_bytes, moment_bytes = BYTES[training.gradient_precision], BYTES[training.moment_precision]

    layers = layers_in_flight(arch.num_layers, p, microbatches_per_replica(training, p, ranks), stage)
    blocks = stage_blocks(arch, p)[stage]
    engine = uses_transformer_engine(recipe)
    layer_bytes = {
        block: activation_bytes_per_token(arch.with_block(block), p, size, transformer_engine=engine, fp8=fp8)
        for block in blocks
    }
    recomputed = training.recomputed_share(p.layers_of_chunks(arch.num_layers)[stage :: p.pp])
    saved = (1 - recomputed) * layers * mean_over_layers(blocks, layer_bytes)
    if training.recompute:
        # One layer at a time is recomputed and then saved in full.
        saved += recomputed * layers * (size * arch.hidden_size / sequence_split) + max(layer_bytes.values())
    if is_last:  # input and output of the final norm
        saved += 2 * size * arch.hidden_size / sequence_split
    # Backward pass of one layer: gradients around the MLP, and tensors that sequence parallelism gathers.
    gathered = 1 if sequence_split > 1 else 0
    mlp = max(arch.widths(block).fc1 + arch.widths(block).fc2 for block in blocks)
    working = mlp / p.tp + (2 + gathered) * arch.hidden_size
    parts = {
        "weights": size * parameters,
        gradients_label(training): gradient_bytes * parameters,
        "optimizer state": (2 * moment_bytes + main_copy_bytes) * parameters / max(1, ranks // (p.tp * p.pp)),
        "activations (estimate)": tokens * saved,
        "working buffers (estimate)": size * tokens * working,
    }
    if fp8:  # one copy and one transposed copy
        parts["FP8 copies of weights"] = 2 * _matrix_parameters(arch, blocks) / p.tp
    if is_last:
        parts["logits and their gradient"] = _loss_bytes(arch, training, p, tokens, size)
    return parts


def gradients_label(training: TrainingConfig) -> str:
    """Return the name of the part with the gradients."""
    return "gradients (float32)" if training.gradient_precision == "fp32" else "gradients (bf16)"


def _loss_bytes(arch: Arch, training: TrainingConfig, p: ParallelConfig, tokens: int, size: int) -> float:
    """Return the bytes of the chunked loss (losses/fused.py).

    They are the logits of both models, their gradients, and the gathered sequence.
    """
    columns = arch.padded_vocab_size // p.tp
    rows = TILE_SIZES["cuda"].rows(tokens, columns)
    chunks = columns * min(tokens, rows.logits_gemm) * 2 * BYTES[training.logits_precision]
    chunks += columns * min(tokens, rows.weight_gradient_gemm) * size
    return chunks + 2 * size * tokens * arch.hidden_size


def _matrix_parameters(arch: Arch, blocks: Counter[BlockArch]) -> int:
    """Return the parameters of the linear layers in the transformer layers of a stage."""
    return sum(count * matrix_elements(arch, block) for block, count in blocks.items())


def fullest(memories: Sequence[Parts]) -> Parts:
    """Return the entry with the largest sum of bytes."""
    return max(memories, key=lambda parts: sum(parts.values()))


def hidden_state_memory(case: PlanningCase, stage: int) -> Parts:
    """Return the bytes by part of the hidden-state losses on a rank of a stage.

    {} without distill.states.
    """
    recipe = case.recipe
    p = recipe.parallel
    states = recipe.distill.states
    if states is None:
        return {}
    blocks = states.blocks(case.student.num_layers, p).get(stage, [])
    pairs = sum(1 for block in blocks if block > 0)
    tokens = recipe.data.sequence_length // p.cp * recipe.distill.micro_batch_size
    tokens_per_rank = tokens / (p.tp if p.sequence_parallel else 1)
    parts: Parts = {}
    if not recipe.teacher.is_remote:
        teacher_values = tokens_per_rank * case.teacher.hidden_size * pairs * case.microbatches
        parts["teacher states of a step"] = BYTES[recipe.teacher_precision] * teacher_values
    in_flight = min(p.pp - stage, case.microbatches)
    student_values = tokens_per_rank * case.student.hidden_size * pairs * in_flight
    parts["gradients of states"] = BYTES[recipe.precision] * student_values
    widths_differ = case.teacher.hidden_size != case.student.hidden_size
    parts["up-projection of states"] = (
        16 * case.teacher.hidden_size * case.student.hidden_size if widths_differ else 0
    )
    return parts


def teacher_memory(case: PlanningCase, stage: int) -> Parts:
    """Return the bytes by part of the teacher on a rank of this stage of the student."""
    recipe = case.recipe
    p = recipe.parallel
    is_last = stage == p.pp - 1
    if recipe.teacher.placement != "colocated":
        return _signal_memory(case) if is_last else {}
    if recipe.correct and recipe.corrects_during_distillation:
        parts = training_memory(
            case.teacher, recipe.correct, recipe, case.student_ranks, stage, recipe.teacher_precision
        )
        memory = {f"teacher, {part}": value for part, value in parts.items()}
    else:
        memory = {"teacher weights": teacher_weights(case.teacher, recipe, p, stage)}
    if is_last:
        tokens = recipe.data.sequence_length // p.cp * recipe.distill.micro_batch_size
        states = BYTES[recipe.teacher_precision] * tokens * case.teacher.hidden_size
        memory["teacher hidden states of a step"] = (
            states / (p.tp if p.sequence_parallel else 1) * case.microbatches
        )
    return memory


def _signal_memory(case: PlanningCase) -> Parts:
    """Return the bytes by part of received teacher signals on a rank of the student's last stage."""
    recipe = case.recipe
    p = recipe.parallel
    t = recipe.teacher
    size = BYTES[recipe.teacher_precision]
    sequence = recipe.data.sequence_length // p.cp
    tokens = sequence * recipe.distill.micro_batch_size
    head = size * case.teacher.padded_vocab_size * case.teacher.hidden_size / p.tp
    parts: Parts = {"teacher's output layer (a copy)": head if t.payload == "hidden" else 0}
    split = p.tp if t.payload == "logits" or sequence % p.tp == 0 else 1
    signal = tokens * payload_bytes_per_token(case.teacher, recipe) / split
    if t.placement == "cached":
        return {**parts, "teacher signal": signal}
    # One window for each teacher replica that sends to this student replica, and the microbatches
    # in use.
    teacher_replicas = case.teacher_ranks // t.parallel.model_ranks
    student_replicas = max(1, case.student_ranks // p.model_ranks)
    senders = teacher_replicas // math.gcd(teacher_replicas, student_replicas) if teacher_replicas else 1
    in_use = p.interleaved if recipe.distill.states else 1
    return {**parts, "teacher signals in the window": signal * (t.window * senders + in_use)}


def held_out_signal_bytes(teacher: Arch, recipe: Recipe, student_ranks: int) -> float:
    """Return the bytes of host memory for a remote teacher's signals for the held-out text.

    On a rank of the student's last stage. workflow/held_out_signals.py keeps them during the run.
    """
    distill, p = recipe.distill, recipe.parallel
    if not recipe.teacher.is_remote or not distill.valid_interval:
        return 0.0
    # A validation compares no hidden states.
    without_states = recipe.model_copy(update={"distill": distill.model_copy(update={"states": None})})
    sequence = recipe.data.sequence_length // p.cp
    split = p.tp if recipe.teacher.payload == "logits" or sequence % p.tp == 0 else 1
    replicas = max(1, student_ranks // p.model_ranks)
    num_tokens = distill.valid_batches * distill.global_batch_size * sequence / replicas
    return num_tokens * payload_bytes_per_token(teacher, without_states) / split


def teacher_weights(teacher: Arch, recipe: Recipe, parallel: ParallelConfig, stage: int) -> float:
    """Return the bytes of a frozen teacher's weights on a rank of a stage.

    In FP8 the linear layers use one byte per weight, because without gradients no transposed copy
    is kept.
    """
    fp8_parameters: float = 0
    if recipe.teacher.fp8:
        fp8_parameters = _matrix_parameters(teacher, stage_blocks(teacher, parallel)[stage]) / parallel.tp
    full_parameters = rank_parameters(teacher, parallel)[stage] - fp8_parameters
    return BYTES[recipe.teacher_precision] * full_parameters + fp8_parameters


def remote_teacher_memory(teacher: Arch, recipe: Recipe, stage: int) -> Parts:
    """Return the bytes by part on a rank of a remote teacher's stage.

    There are no gradients, and activations of one layer at a time.
    """
    p = recipe.teacher.parallel
    size = BYTES[recipe.teacher_precision]
    tokens = recipe.data.sequence_length // p.cp * recipe.distill.micro_batch_size
    layer = max(
        activation_bytes_per_token(
            teacher.with_block(block),
            p,
            size,
            transformer_engine=uses_transformer_engine(recipe),
            fp8=recipe.teacher.fp8 is not None,
        )
        for block in stage_blocks(teacher, p)[stage]
    )
    signal = tokens * payload_bytes_per_token(teacher, recipe) / p.tp
    is_last = stage == p.pp - 1
    stage_inputs = 1 + (p.pp if p.pp > 1 else 0)
    return {
        "teacher weights": teacher_weights(teacher, recipe, p, stage),
        "working buffers (estimate)": tokens * layer + size * tokens * teacher.hidden_size * stage_inputs,
        "teacher signals in the window": signal * (recipe.teacher.window + 1) if is_last else 0,
    }


def distillation_memory(case: PlanningCase) -> list[Parts]:
    """Return the bytes by part on a rank of each pipeline stage of the student."""
    recipe = case.recipe
    return [
        {
            **training_memory(case.student, recipe.distill, recipe, case.student_ranks, stage),
            **teacher_memory(case, stage),
            **hidden_state_memory(case, stage),
        }
        for stage in range(recipe.parallel.pp)
    ]


def training_peak(arch: Arch, training: TrainingConfig, recipe: Recipe, ranks: int) -> float:
    """Return the bytes on the fullest rank while a model is trained without a teacher."""
    stages = range(recipe.parallel.pp)
    return sum(fullest([training_memory(arch, training, recipe, ranks, stage) for stage in stages]).values())
