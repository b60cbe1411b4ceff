"""What a training step costs and how well the hardware is used: the numbers of a clock beside the loss.

FLOPs are those of the models (flops.py), not those that run: recomputed activations count once. Rates are per rank that does the work:
the student's on its ranks, the teacher's on the ranks where it runs. Where both share ranks, they share the time, and their rates add up.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from minitron_mp.config.recipe import Recipe
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
"""Device name -> dense bf16 TFLOP/s, as NVIDIA's data sheets have it; the first that matches. MFU is of this also where FP8 computes."""


def peak_tflops(device: str) -> float | None:
    """Of a GPU by its name; None for one that the table does not have."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b({name})\b", device)), None)


@dataclass(frozen=True)
class Work:
    """What a step computes. tokens: over all data parallel ranks, padding included; FLOPs a token: of the student's training, of the teacher by step."""

    tokens: int
    student: float
    student_ranks: int
    teacher: Callable[[int], float] = lambda step: 0.0
    teacher_ranks: int = 0
    peak: float | None = None
    """TFLOP/s of a rank's device; None: there is no MFU."""

    def rates(self, step: int, seconds: float) -> dict[str, float]:
        """TFLOP/s a rank, and its share of the peak, in a step (from 0) that took so long."""
        found = {"student_tflops": self.student * self.tokens / self.student_ranks / seconds / 1e12}
        if self.teacher_ranks:
            found["teacher_tflops"] = self.teacher(step) * self.tokens / self.teacher_ranks / seconds / 1e12
        return found | (
            {name.replace("tflops", "mfu"): rate / self.peak for name, rate in found.items()}
            if self.peak
            else {}
        )


@dataclass(frozen=True)
class Throughput:
    """What a clock says of a step; means over the steps of a logged interval. docs/training.md has the definitions."""

    tokens_per_s_per_gpu: float | None = None
    student_tflops: float | None = None
    student_mfu: float | None = None
    teacher_tflops: float | None = None
    teacher_mfu: float | None = None
    teacher_wait_s: float | None = None
    transport_gb_per_s: float | None = None
    peak_memory_gib: float | None = None
    eta_s: float | None = None
    save_s: float | None = None

    def line(self) -> str:
        """The part of them that fits on a console line."""
        parts = []
        for name in ("student", "teacher"):
            rate, share = getattr(self, f"{name}_tflops"), getattr(self, f"{name}_mfu")
            if rate is not None:
                parts.append(
                    f"{name} {rate:,.3g} TFLOP/s/GPU" + (f" ({share:.1%})" if share is not None else "")
                )
        if self.teacher_wait_s is not None:
            parts.append(f"wait {self.teacher_wait_s:.3f} s")
        if self.peak_memory_gib is not None:
            parts.append(f"{self.peak_memory_gib:.1f} GiB")
        if self.save_s:
            parts.append(f"checkpoint {self.save_s:.2f} s")
        return "  ".join(parts)


def training_work(recipe: Recipe, arch: Arch, world: Any, *, tokens: int) -> Work:
    """Of a model trained alone on this world's ranks; tokens: a step."""
    peak = (
        peak_tflops(torch.cuda.get_device_name(world.device))
        if world.device.type == "cuda" and recipe.precision == "bf16"
        else None
    )
    return Work(tokens, training_flops(arch, recipe.data.sequence_length), world.size, peak=peak)


def distillation_work(recipe: Recipe, student: Arch, teacher: Arch, world: Any, *, tokens: int) -> Work:
    """Of student and teacher, wherever the teacher is: the output layer that turns its hidden states into logits counts where that is done."""
    t, length, work = (
        recipe.teacher,
        recipe.data.sequence_length,
        training_work(recipe, student, world, tokens=tokens),
    )
    whole, apart = forward_flops(teacher, length), t.placement != "colocated"
    head_here = head_flops(teacher) if apart and t.payload == "hidden" else 0.0
    work = replace(work, student=work.student + head_here)
    if t.placement == "cached":
        return work
    if t.placement == "remote":
        return replace(
            work, teacher=lambda step: whole - head_here, teacher_ranks=len(world.channel.spans["teacher"])
        )
    learns = recipe.correct.steps if recipe.correct and recipe.corrects_during_distillation else 0
    return replace(
        work,
        teacher=lambda step: training_flops(teacher, length) if step < learns else whole,
        teacher_ranks=world.size,
    )


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process had so far: of the GPU's tensors, or on a CPU all of it. No synchronisation."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
