"""Step time and bytes on the wire of one layout, before it runs: closed forms over layer times (hardware.py) and memory (cost.py).

pipeline        a step of m microbatches: m x the slowest stage, and once through the others: (sum - slowest) / vpp     arXiv 2104.04473
tensor          a layer and microbatch: 4 all-gathers' worth of [s b h] forward, 4 backward (2 all-reduces are as many)  arXiv 2205.05198
context         keys and values are gathered forward, their gradients scattered backward                                 model.Attention
data            float32 gradients scattered, weights gathered, once a step; with overlap what the last microbatch's
                backward pass (gradients) and the first one's forward pass (weights) do not hide, at least one bucket    arXiv 1910.02054
teacher         colocated: its forward passes come first, in the student's layout. Remote: the step takes as long as the slower of the two, since
                a window of two or more microbatches hides the transfer; a window of one shows the teacher's time
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.distributed.layout import layers_of_stages
from minitron_mp.models.arch import Arch, BlockArch
from minitron_mp.models.number_formats import BYTES
from minitron_mp.planning.hardware import MEASURED, ROOFLINE, SCALED, Times
from minitron_mp.planning.memory import (
    distilling_memory,
    fp8_of,
    fullest,
    payload_bytes_per_token,
    rank_parameters,
    remote_teacher_memory,
)

BUCKET = 40_000_000
"""Parameters whose gradients Megatron reduces together, at least; a million for each data parallel rank where that is more."""

STUDENT, TEACHER, LOSS, AGAIN = (
    "student's layers",
    "teacher's layers",
    "output layers and loss",
    "recomputation",
)

TP, CP, PP, DP, HOST = (
    "tensor parallel",
    "context parallel",
    "pipeline transfers",
    "data parallel",
    "waiting for the host",
)

BUBBLE, UNEVEN, OPTIMIZER, WAIT, STREAM = (
    "pipeline bubble",
    "uneven stages",
    "optimizer",
    "waiting for the teacher",
    "teacher stream",
)

WORK = (STUDENT, TEACHER, LOSS, AGAIN)
"""Parts of a step that are computation; the others are what a layout costs."""

Parts = dict[str, float]


@dataclass(frozen=True)
class Wire:
    """What a GPU sends in a step at one kind of transfer."""

    link: str
    num_bytes: float


@dataclass(frozen=True)
class Estimate:
    """One layout. seconds: of a step, by part; their sum is the step. basis: the weakest of what the times rest on (hardware.py)."""

    student: Arch
    teacher: Arch
    recipe: Recipe
    world: int
    students: int
    teachers: int
    seconds: Parts
    wire: dict[str, Wire]
    basis: str
    tokens: int
    """A step."""

    @cached_property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @cached_property
    def memory(self) -> Parts:
        """Bytes by part on the fullest GPU of the student."""
        return fullest(
            distilling_memory(self.student, self.teacher, self.recipe, self.students, self.teachers)
        )

    @cached_property
    def teacher_memory(self) -> Parts:
        """Bytes by part on the fullest GPU of a remote teacher; {} without one."""
        if not self.recipe.teacher.is_remote:
            return {}
        return fullest(
            [
                remote_teacher_memory(self.teacher, self.recipe, stage)
                for stage in range(self.recipe.teacher.parallel.pp)
            ]
        )

    @cached_property
    def needs_bytes(self) -> float:
        """Of a GPU, on the fullest one."""
        return max(sum(self.memory.values()), sum(self.teacher_memory.values()))

    @property
    def tokens_per_gpu_s(self) -> float:
        return self.tokens / self.step_s / self.world

    @property
    def hours(self) -> float:
        """Of the whole distillation."""
        return self.step_s * self.recipe.distill.steps / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.world

    @property
    def bottleneck(self) -> tuple[str, float]:
        """(the largest part that is no computation, its share of the step)."""
        name = max((name for name in self.seconds if name not in WORK), key=lambda name: self.seconds[name])
        return name, self.seconds[name] / self.step_s


def estimate_distillation(student: Arch, teacher: Arch, recipe: Recipe, world: int, times: Times) -> Estimate:
    """The stage `distill` on so many GPUs. The layout must be possible (layouts.problems)."""
    d, p, t = recipe.distill, recipe.parallel, recipe.teacher
    teachers = t.ranks_in(world)
    students = world - teachers - sum(t.siblings.values())
    seconds, wire, basis = estimate_training(
        student, d, recipe, students, times, teacher if t.payload == "hidden" else None
    )
    microbatches = d.global_batch_size // d.micro_batch_size
    own = microbatches // (students // p.model_ranks)
    if t.placement == "colocated":
        if recipe.correct and recipe.corrects_meanwhile:
            more, carried, rests = estimate_training(teacher, recipe.correct, recipe, students, times, None)
        else:
            stages, carried, rests = _stages(
                teacher,
                recipe,
                p,
                d.micro_batch_size,
                times,
                _dtype(t, recipe.teacher_precision),
                train=False,
            )
            more, carried = (
                _pipeline(stages, own, p),
                {name: Wire(w.link, w.num_bytes * own) for name, w in carried.items()},
            )
        for name, value in more.items():
            name = TEACHER if name == STUDENT else name
            seconds[name] = seconds.get(name, 0.0) + value
        for name, w in carried.items():
            wire[name] = Wire(w.link, w.num_bytes + (wire[name].num_bytes if name in wire else 0.0))
        basis = _weaker(basis, rests)
    elif t.placement == "cached":
        wire[STREAM] = Wire(
            "disk",
            payload_bytes_per_token(teacher, recipe)
            * recipe.data.sequence_length
            * d.micro_batch_size
            * own
            / (p.tp * p.cp),
        )
    else:
        stages, _, rests = _stages(
            teacher,
            recipe,
            t.parallel,
            d.micro_batch_size,
            times,
            _dtype(t, recipe.teacher_precision),
            train=False,
        )
        basis = _weaker(basis, rests)
        copies, copies_of_student = teachers // t.parallel.model_ranks, students // p.model_ranks
        if t.payload != "hidden":
            tokens = recipe.data.sequence_length // t.parallel.cp * d.micro_batch_size
            stages[-1][LOSS] = (
                2
                * tokens
                * teacher.hidden_size
                * teacher.padded_vocab_size
                / t.parallel.tp
                / times.rates["bf16"]
            )
        each = max(sum(stage.values()) for stage in stages)
        sent = payload_bytes_per_token(teacher, recipe) * recipe.data.sequence_length * d.micro_batch_size
        arrives = sent * own / (p.tp * p.cp)
        step = sum(seconds.values())
        seconds[WAIT] = max(0.0, microbatches / copies * each - step)
        if t.window * max(1, copies // copies_of_student) == 1:  # the next one is begun when the last is used
            seconds[WAIT] = own * (
                sum(sum(stage.values()) for stage in stages) + sent / (p.tp * p.cp) / times.nic
            )
        leaves = sent * microbatches / copies / (t.parallel.tp * t.parallel.cp)
        seconds[STREAM] = max(0.0, max(arrives, leaves) / times.nic - step - seconds[WAIT])
        wire[STREAM] = Wire("network", arrives)
    tokens = d.global_batch_size * recipe.data.sequence_length
    return Estimate(student, teacher, recipe, world, students, teachers, seconds, wire, basis, tokens)


def estimate_training(
    arch: Arch, settings: TrainingConfig, recipe: Recipe, ranks: int, times: Times, teacher: Arch | None
) -> tuple[Parts, dict[str, Wire], str]:
    """(seconds of a step by part, what a GPU sends, what the times rest on) of a model on so many ranks; teacher: whose output layer the loss applies."""
    p, size = recipe.parallel, BYTES[recipe.precision]
    dp = ranks // p.model_ranks
    own = settings.global_batch_size // settings.micro_batch_size // dp
    dtype = _dtype(settings, recipe.precision)
    options = {
        "train": True,
        "recompute": settings.recompute,
        "overlapped": settings.tp_comm_overlap,
        "cuda_graphs": settings.cuda_graphs,
    }
    stages, carried, basis = _stages(arch, recipe, p, settings.micro_batch_size, times, dtype, **options)
    tokens = recipe.data.sequence_length // p.cp * settings.micro_batch_size
    hidden = teacher.hidden_size if teacher else 0
    loss, rests = times.loss(
        arch.hidden_size,
        hidden,
        arch.padded_vocab_size,
        tokens,
        p.tp,
        settings.logits_precision,
        recipe.precision,
    )
    stages[-1][LOSS] = loss
    stages[-1][TP] += times.collective_s(size * tokens * (2 * arch.hidden_size + hidden), p.tp, 1)
    seconds = _pipeline(stages, own, p)
    wire = {name: Wire(w.link, w.num_bytes * own) for name, w in carried.items()}

    parameters, group = max(rank_parameters(arch, p)), dp * p.cp
    scatter, gather = (times.collective_s(width * parameters, group, p.tp) for width in (4, size))
    if settings.overlap:
        slowest = max(sum(stage.values()) for stage in stages)
        bucket = min(parameters, max(BUCKET, 1_000_000 * group))
        scatter = max(scatter - slowest * 2 / 3, times.collective_s(4 * bucket, group, p.tp))
        gather = max(gather - slowest / 3, times.collective_s(size * bucket, group, p.tp))
    if group > 1:
        seconds[DP] = scatter + gather
        wire[DP] = Wire(_link(times, group, p.tp), (4 + size) * parameters * (group - 1) / group)
    # Adam reads gradient, weight and moments and writes them and the weight of the model; buffers are zeroed, and the norm reads them.
    seconds[OPTIMIZER] = (34 * parameters / group + 8 * parameters) / times.hbm
    return seconds, wire, _weaker(basis, rests)


def _stages(
    arch: Arch,
    recipe: Recipe,
    p: ParallelConfig,
    micro_batch_size: int,
    times: Times,
    dtype: str,
    *,
    train: bool,
    recompute: bool = False,
    overlapped: bool = False,
    cuda_graphs: bool = False,
) -> tuple[list[Parts], dict[str, Wire], str]:
    """(seconds of a microbatch on each pipeline stage by part, what a GPU of the first stage sends for it, what the times rest on)."""
    sequence, size = recipe.data.sequence_length, 4 if dtype == "fp32" else 2
    tokens = sequence // p.cp * micro_batch_size
    along = p.tp if p.sequence_parallel else 1
    passes = 1 + train + recompute
    states = size * tokens * arch.hidden_size
    exposed = times.hardware.tp_exposed_overlapped if overlapped else times.hardware.tp_exposed
    tensor = 4 * passes * times.collective_s(states, p.tp, 1) * exposed
    issued = times.issue_s(dtype, (3 if train else 1) + recompute, cuda_graphs=cuda_graphs)

    def key_bytes(block: BlockArch) -> float:
        return size * tokens * p.cp * (arch.dim_size("qkv", block) - arch.dim_size("heads", block)) / p.tp

    def layer_parts(block: BlockArch) -> tuple[Parts, str]:
        """(seconds of a microbatch in one layer, by part, what the time of the layer rests on)."""
        like = arch.with_block(block)
        layer, basis = times.layer(like, tokens, sequence, p, dtype, train)
        again = times.layer(like, tokens, sequence, p, dtype, False)[0] if recompute else 0.0
        context = passes * times.collective_s(key_bytes(block), p.cp, p.tp)
        idle = max(0.0, issued - layer - again - tensor - context)
        return {STUDENT: layer, AGAIN: again, TP: tensor, CP: context, HOST: idle}, basis

    of_layer = {block: layer_parts(block) for block in set(arch.blocks)}
    basis = functools.reduce(_weaker, (rests for _, rests in of_layer.values()))
    # Interleaved stages send while they compute; others wait for what comes in, forward and backward.
    pipeline_link = (
        _link(times, p.pp, p.model_ranks // p.pp * max(1, times.hardware.gpus_per_node // (p.tp * p.cp)))
        if p.pp > 1
        else ""
    )
    speed = times.nic if pipeline_link == "network" else times.nvlink
    transfer = (
        0.0
        if p.pp == 1 or p.vpp
        else (1 + train) * (states / along / speed + times.hardware.latency_us / 1e6)
    )
    blocks = [[arch.blocks[layer] for layer in layers] for layers in layers_of_stages(arch.num_layers, p)]
    stages = []
    for counts in map(Counter, blocks):
        names = (STUDENT, AGAIN, TP, CP, HOST)
        stage = {name: sum(n * of_layer[block][0][name] for block, n in counts.items()) for name in names}
        stages.append({**stage, PP: transfer})
    wire = {}
    if (
        p.tp > 1
    ):  # with sequence parallelism the products' inputs are gathered once more for the weights' gradients
        extra = 2 * train * p.sequence_parallel
        wire[TP] = Wire(
            _link(times, p.tp, 1), len(blocks[0]) * (4 * passes + extra) * states * (p.tp - 1) / p.tp
        )
    if p.cp > 1:
        keys = sum(n * key_bytes(block) for block, n in Counter(blocks[0]).items())
        wire[CP] = Wire(_link(times, p.cp, p.tp), passes * keys * (p.cp - 1) / p.cp)
    if p.pp > 1:
        wire[PP] = Wire(pipeline_link, (1 + train) * (p.vpp or 1) * states / along)
    return stages, wire, basis


def _pipeline(stages: list[Parts], microbatches: int, p: ParallelConfig) -> Parts:
    """Seconds of a step by part: parts as a mean over the stages, and what the slowest stage and filling the pipeline add."""
    sums = [sum(stage.values()) for stage in stages]
    names = dict.fromkeys(name for stage in stages for name in stage)
    parts = {
        name: microbatches * sum(stage.get(name, 0.0) for stage in stages) / len(stages) for name in names
    }
    if len(stages) > 1:
        parts[UNEVEN] = microbatches * (max(sums) - sum(sums) / len(sums))
        parts[BUBBLE] = (sum(sums) - max(sums)) / (p.vpp or 1)
    return {name: value for name, value in parts.items() if value or name == STUDENT}


def _dtype(section: Any, precision: str) -> str:
    return fp8_of(section) or precision


def _link(times: Times, size: int, stride: int) -> str:
    return "network" if times.nodes(size, stride)[1] > 1 else "NVLink"


def _weaker(a: str, b: str) -> str:
    return max(a, b, key=(MEASURED, SCALED, ROOFLINE).index)
