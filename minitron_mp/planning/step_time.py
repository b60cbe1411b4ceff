"""Step time and traffic of one layout, in closed form from layer times (times.py).

pipeline   a step of m microbatches takes m x the slowest stage, plus the other stages once,
           divided by vpp: (sum - slowest) / vpp (arXiv 2104.04473)
tensor     per layer and microbatch: 4 all-gathers of [s b h] forward, 4 backward; two all-reduces
           cost the same (arXiv 2205.05198)
context    keys and values are gathered forward, their gradients are scattered backward
data       float32 gradients are scattered and weights gathered once a step. With overlap the last
           microbatch's backward pass hides the scatter and the first one's forward pass hides the
           gather, except for one bucket (arXiv 1910.02054)
teacher    colocated: its forward passes run first, in the student's layout. remote: the step takes
           as long as the slower side, because a window of two or more microbatches hides the
           transfer; with a window of one the teacher's time is added
"""

from __future__ import annotations

from dataclasses import dataclass

from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.training import CorrectionConfig, TrainingConfig
from minitron_mp.losses.parameters import SECOND_PASS
from minitron_mp.models.arch import Arch
from minitron_mp.models.number_formats import BYTES
from minitron_mp.planning.case import PlanningCase
from minitron_mp.planning.estimate import BUBBLE, DP, OPTIMIZER, STREAM, UNEVEN, WAIT, Estimate
from minitron_mp.planning.memory import Parts, payload_bytes_per_token, rank_parameters
from minitron_mp.planning.model_pass import (
    LOSS,
    STUDENT,
    TEACHER,
    TP,
    ModelPass,
    StageTimes,
    Traffic,
    link_name,
    stage_times,
)
from minitron_mp.planning.times import OutputLayers, Times, less_certain

SECOND_SUMS_BYTES = 12
"""Bytes per token and rank of the all-gather of a divergence with a second pass: three float32."""

BUCKET = 40_000_000
"""Smallest number of parameters whose gradients Megatron reduces together.

A bucket has a million parameters per data-parallel rank if that is larger.
"""


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step by part, the traffic of a GPU, and the source of the times (times.py)."""

    seconds: Parts
    traffic: dict[str, Traffic]
    basis: str


def estimate_distillation(case: PlanningCase, times: Times) -> Estimate:
    """Estimate the stage `distill`. The layout must be possible (layouts.layout_problem)."""
    recipe = case.recipe
    loss_teacher = case.teacher if recipe.teacher.payload == "hidden" else None
    student = estimate_training(case.student, recipe.distill, recipe, case.student_ranks, times, loss_teacher)
    if recipe.teacher.placement == "colocated":
        cost = _add_colocated_teacher(student, case, times)
    elif recipe.teacher.placement == "cached":
        signal = _signal_bytes(case) * case.microbatches / (recipe.parallel.tp * recipe.parallel.cp)
        cost = StepCost(student.seconds, student.traffic | {STREAM: Traffic("disk", signal)}, student.basis)
    else:
        cost = _add_remote_teacher(student, case, times)
    return Estimate(case, cost.seconds, cost.traffic, cost.basis, _correction(case, cost.seconds, times))


def _correction(case: PlanningCase, seconds: Parts, times: Times) -> float:
    """Return expected / arithmetic time of a step. The teacher's layers may have another format."""
    recipe = case.recipe
    teacher_s = seconds.get(TEACHER, 0.0)
    student = times.correction(recipe.distill.fp8 or recipe.precision)
    teacher = times.correction(recipe.teacher.fp8 or recipe.teacher_precision)
    if seconds.get(WAIT):
        return teacher
    return student + (teacher - student) * teacher_s / sum(seconds.values())


def _signal_bytes(case: PlanningCase) -> int:
    """Return the bytes of the teacher's signals for one microbatch."""
    tokens = case.recipe.data.sequence_length * case.recipe.distill.micro_batch_size
    return payload_bytes_per_token(case.teacher, case.recipe) * tokens


def teacher_stages(case: PlanningCase, parallel: ParallelConfig, times: Times) -> StageTimes:
    """Return the times of the teacher's forward pass for one microbatch in the given layout."""
    recipe = case.recipe
    work = ModelPass(
        case.teacher,
        parallel,
        recipe.data.sequence_length,
        recipe.distill.micro_batch_size,
        recipe.teacher.fp8 or recipe.teacher_precision,
    )
    return stage_times(work, times)


def _add_colocated_teacher(student: StepCost, case: PlanningCase, times: Times) -> StepCost:
    """Add the teacher's passes, which run before the student's on the same ranks."""
    recipe = case.recipe
    if recipe.correct and recipe.corrects_during_distillation:
        teacher = estimate_training(case.teacher, recipe.correct, recipe, case.student_ranks, times, None)
    else:
        forward = teacher_stages(case, recipe.parallel, times)
        teacher = StepCost(
            pipeline_seconds(forward.stages, case.microbatches, recipe.parallel),
            _scaled(forward.traffic, case.microbatches),
            forward.basis,
        )
    seconds = dict(student.seconds)
    for name, value in teacher.seconds.items():
        part = TEACHER if name == STUDENT else name
        seconds[part] = seconds.get(part, 0.0) + value
    traffic = dict(student.traffic)
    for name, sent in teacher.traffic.items():
        before = traffic[name].num_bytes if name in traffic else 0.0
        traffic[name] = Traffic(sent.link, sent.num_bytes + before)
    return StepCost(seconds, traffic, less_certain(student.basis, teacher.basis))


def _add_remote_teacher(student: StepCost, case: PlanningCase, times: Times) -> StepCost:
    """Add the waits for a teacher on separate ranks, and for its stream."""
    p = case.recipe.parallel
    t = case.recipe.teacher
    forward = teacher_stages(case, t.parallel, times)
    if t.payload != "hidden":
        tokens = case.recipe.data.sequence_length // t.parallel.cp * case.recipe.distill.micro_batch_size
        logits_flops = 2 * tokens * case.teacher.hidden_size * case.teacher.padded_vocab_size
        forward.stages[-1][LOSS] = logits_flops / t.parallel.tp / times.rates["bf16"]
    teacher_replicas = case.teacher_ranks // t.parallel.model_ranks
    student_replicas = case.student_ranks // p.model_ranks
    microbatches = case.recipe.distill.global_batch_size // case.recipe.distill.micro_batch_size
    signal_bytes = _signal_bytes(case)
    received = signal_bytes * case.microbatches / (p.tp * p.cp)
    sent = signal_bytes * microbatches / teacher_replicas / (t.parallel.tp * t.parallel.cp)

    step = sum(student.seconds.values())
    if t.window * max(1, teacher_replicas // student_replicas) == 1:
        # The teacher starts a microbatch only when the student has consumed the one before.
        all_stages = sum(sum(stage.values()) for stage in forward.stages)
        wait = case.microbatches * (all_stages + signal_bytes / (p.tp * p.cp) / times.nic)
    else:
        wait = max(0.0, microbatches / teacher_replicas * forward.slowest_s - step)
    stream = max(0.0, max(received, sent) / times.nic - step - wait)
    return StepCost(
        student.seconds | {WAIT: wait, STREAM: stream},
        student.traffic | {STREAM: Traffic("network", received)},
        less_certain(student.basis, forward.basis),
    )


def training_pass(arch: Arch, training: TrainingConfig, recipe: Recipe) -> ModelPass:
    """Return a microbatch of a model in training, in the student's layout."""
    p = recipe.parallel
    return ModelPass(
        arch,
        p,
        recipe.data.sequence_length,
        training.micro_batch_size,
        training.fp8 or recipe.precision,
        train=True,
        recompute=training.recomputed_share(p.layers_of_chunks(arch.num_layers)),
        tp_comm_overlap=training.tp_comm_overlap,
        cuda_graphs=training.cuda_graphs,
    )


def estimate_training(
    arch: Arch,
    training: DistillConfig | CorrectionConfig,
    recipe: Recipe,
    ranks: int,
    times: Times,
    teacher: Arch | None,
) -> StepCost:
    """Return the cost of a training step on `ranks` ranks.

    teacher: the model whose output layer the loss applies.
    """
    p = recipe.parallel
    size = BYTES[recipe.precision]
    dp = ranks // p.model_ranks
    microbatches = training.global_batch_size // training.micro_batch_size // dp
    work = training_pass(arch, training, recipe)
    passes = stage_times(work, times)
    teacher_hidden_size = teacher.hidden_size if teacher else 0
    output_layers = OutputLayers(
        arch.hidden_size,
        teacher_hidden_size,
        arch.padded_vocab_size,
        work.tokens,
        p.tp,
        training.logits_precision,
        recipe.precision,
        second_pass=training.kl_weight > 0 and training.divergence in SECOND_PASS,
    )
    loss, loss_basis = times.loss(output_layers)
    passes.stages[-1][LOSS] = loss
    gathered = size * work.tokens * (2 * arch.hidden_size + teacher_hidden_size)
    if output_layers.second_pass:
        gathered += SECOND_SUMS_BYTES * work.tokens * p.tp
    passes.stages[-1][TP] += times.collective_s(gathered, p.tp, 1)
    seconds = pipeline_seconds(passes.stages, microbatches, p)
    traffic = _scaled(passes.traffic, microbatches)

    parameters = max(rank_parameters(arch, p))
    group = dp * p.cp
    gradient_bytes, moment_bytes = BYTES[training.gradient_precision], BYTES[training.moment_precision]
    if group > 1:
        seconds[DP] = _data_parallel_s(parameters, group, size, training, passes.slowest_s, p.tp, times)
        sent = (gradient_bytes + size) * parameters * (group - 1) / group
        traffic[DP] = Traffic(link_name(times, group, p.tp), sent)
    # Adam reads gradient, weight and moments, and writes them and the model's weight: 34 bytes in
    # float32. Gradient buffers are zeroed and read for the norm: 8 bytes.
    update_bytes = 14 + gradient_bytes + 4 * moment_bytes
    seconds[OPTIMIZER] = (update_bytes / group + 2 * gradient_bytes) * parameters / times.hbm
    return StepCost(seconds, traffic, less_certain(passes.basis, loss_basis))


def _data_parallel_s(
    parameters: int,
    group: int,
    size: int,
    training: TrainingConfig,
    slowest_s: float,
    stride: int,
    times: Times,
) -> float:
    """Return the seconds of gradient scatter and weight gather that computation does not hide."""
    gradient_bytes = BYTES[training.gradient_precision]
    scatter = times.collective_s(gradient_bytes * parameters, group, stride)
    gather = times.collective_s(size * parameters, group, stride)
    if training.overlap:
        bucket = min(parameters, max(BUCKET, 1_000_000 * group))
        scatter = max(scatter - slowest_s * 2 / 3, times.collective_s(gradient_bytes * bucket, group, stride))
        gather = max(gather - slowest_s / 3, times.collective_s(size * bucket, group, stride))
    return scatter + gather


def _scaled(traffic: dict[str, Traffic], count: int) -> dict[str, Traffic]:
    return {name: Traffic(sent.link, sent.num_bytes * count) for name, sent in traffic.items()}


def pipeline_seconds(stages: list[Parts], microbatches: int, p: ParallelConfig) -> Parts:
    """Return the seconds of a step by part: the mean over stages, the extra time of the slowest
    stage, and the bubble.
    """
    sums = [sum(stage.values()) for stage in stages]
    names = dict.fromkeys(name for stage in stages for name in stage)
    parts = {
        name: microbatches * sum(stage.get(name, 0.0) for stage in stages) / len(stages) for name in names
    }
    if len(stages) > 1:
        parts[UNEVEN] = microbatches * (max(sums) - sum(sums) / len(sums))
        parts[BUBBLE] = (sum(sums) - max(sums)) / (p.vpp or 1)
    return {name: value for name, value in parts.items() if value or name == STUDENT}
