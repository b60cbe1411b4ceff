"""Throughput of a training step: FLOP rates, memory and waiting times.

FLOPs are model FLOPs (models/flops.py): recomputed activations count once. Rates are per rank: the
student's rate on the ranks of the student, the teacher's rate on the ranks of the teacher. If both
run on the same ranks, they share the time, and the rates add up.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from minitron_mp.config.recipe import Recipe
from minitron_mp.distributed.world import World
from minitron_mp.models.arch import Arch
from minitron_mp.models.flops import forward_flops, head_flops, training_flops

PEAK_TFLOPS = {
    r"GB[23]00": 2500.0,
    r"B[23]00": 2250.0,
    r"H100 NVL": 835.0,
    r"H100 PCIe": 756.0,
    r"(H100|H200|GH200|H800)": 989.4,
    r"A100|A800": 312.0,
    r"L40S": 362.0,
}
"""Pattern of a device name -> dense bf16 TFLOP/s of NVIDIA's data sheet. The first match counts.
MFU is relative to this peak also for FP8."""


def peak_tflops(device: str) -> float | None:
    """Return the peak TFLOP/s of a GPU by its name, or None if the table does not have it."""
    for name, peak in PEAK_TFLOPS.items():
        if re.search(rf"\b({name})\b", device):
            return peak
    return None


def no_flops(step: int) -> float:
    """Return 0, the FLOPs of a job without a teacher."""
    return 0.0


@dataclass(frozen=True)
class StepWork:
    """The computation of one training step.

    tokens: tokens over all data-parallel ranks, with padding.
    student_flops: FLOPs per token of forward and backward pass.
    student_ranks: number of ranks that share student_flops.
    teacher_flops(step): FLOPs per token of the teacher in a step (from 0).
    teacher_ranks: number of ranks that share teacher_flops; 0 without a teacher.
    peak_tflops: peak TFLOP/s of a rank's device. None: MFU is not reported.
    """

    tokens: int
    student_flops: float
    student_ranks: int
    teacher_flops: Callable[[int], float] = no_flops
    teacher_ranks: int = 0
    peak_tflops: float | None = None

    def rates(self, step: int, seconds: float) -> dict[str, float]:
        """Return TFLOP/s per rank and MFU of a step (from 0) that took `seconds`."""
        student = self.student_flops * self.tokens / self.student_ranks / seconds / 1e12
        rates = {"student_tflops": student}
        if self.teacher_ranks:
            teacher = self.teacher_flops(step) * self.tokens / self.teacher_ranks / seconds / 1e12
            rates["teacher_tflops"] = teacher
        if self.peak_tflops:
            shares = {name.replace("tflops", "mfu"): rate / self.peak_tflops for name, rate in rates.items()}
            rates |= shares
        return rates


@dataclass(frozen=True)
class Throughput:
    """Throughput of one step: means over a log interval. docs/parallelism.md defines them."""

    tokens_per_s_per_gpu: float | None = None
    student_tflops: float | None = None
    student_mfu: float | None = None
    teacher_tflops: float | None = None
    teacher_mfu: float | None = None
    teacher_wait_s: float | None = None
    transport_gb_per_s: float | None = None
    peak_memory_gib: float | None = None
    slowest_rank: int | None = None
    """Rank with the slowest forward passes in relation to its pipeline stage (stragglers.py)."""
    slowest_forward_s: float | None = None
    median_forward_s: float | None = None
    eta_s: float | None = None
    save_s: float | None = None
    """Seconds for which checkpoints have blocked training since the last log."""

    def console_line(self) -> str:
        """Return the values that fit on a line of the console."""
        parts = [
            _rate("student", self.student_tflops, self.student_mfu),
            _rate("teacher", self.teacher_tflops, self.teacher_mfu),
        ]
        if self.teacher_wait_s is not None:
            parts.append(f"wait {self.teacher_wait_s:.3f} s")
        if self.peak_memory_gib is not None:
            parts.append(f"{self.peak_memory_gib:.1f} GiB")
        if self.save_s:
            parts.append(f"checkpoint {self.save_s:.2f} s")
        return "  ".join(part for part in parts if part)


def _rate(name: str, tflops: float | None, mfu: float | None) -> str:
    if tflops is None:
        return ""
    share = f" ({mfu:.1%})" if mfu is not None else ""
    return f"{name} {tflops:,.3g} TFLOP/s/GPU{share}"


def training_work(recipe: Recipe, arch: Arch, world: World, *, tokens: int) -> StepWork:
    """Return the work of a model that is trained alone on this world's ranks.

    tokens: tokens per step.
    """
    peak = None
    if world.device.type == "cuda" and recipe.precision == "bf16":
        peak = peak_tflops(torch.cuda.get_device_name(world.device))
    flops = training_flops(arch, recipe.data.sequence_length)
    return StepWork(tokens, flops, world.size, peak_tflops=peak)


def distillation_work(recipe: Recipe, student: Arch, teacher: Arch, world: World, *, tokens: int) -> StepWork:
    """Return the work of student and teacher, for any placement of the teacher.

    The teacher's output layer counts on the ranks that compute its logits. tokens: tokens per step.
    """
    length = recipe.data.sequence_length
    work = training_work(recipe, student, world, tokens=tokens)
    teacher_flops = forward_flops(teacher, length)
    if recipe.teacher.placement == "colocated":
        corrected_steps = (
            recipe.correct.steps if recipe.correct and recipe.corrects_during_distillation else 0
        )
        trained_flops = training_flops(teacher, length)
        return replace(
            work,
            teacher_flops=lambda step: trained_flops if step < corrected_steps else teacher_flops,
            teacher_ranks=world.size,
        )
    student_head_flops = head_flops(teacher) if recipe.teacher.payload == "hidden" else 0.0
    work = replace(work, student_flops=work.student_flops + student_head_flops)
    if recipe.teacher.placement == "cached":
        return work
    assert world.channel is not None
    return replace(
        work,
        teacher_flops=lambda step: teacher_flops - student_head_flops,
        teacher_ranks=len(world.channel.spans["teacher"]),
    )


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process: of GPU tensors, or of the process on a CPU.

    It does not synchronise with the device.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
