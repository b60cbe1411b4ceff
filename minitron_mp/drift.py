"""What FP8 costs the teacher: KL(teacher in bf16 || teacher in FP8) on some held-out text, told before a student learns from the second."""

from __future__ import annotations

from typing import Any

from minitron_mp.console import say
from minitron_mp.evaluate import compare
from minitron_mp.job import Job

SAMPLES = 4
"""Of held-out text; 4 x 8192 tokens."""


def tell_drift(job: Job, chunks: list[Any] | None) -> str | None:
    """What rank 0 of the student says of a teacher in FP8; None, and nothing done, where the recipe has none.

    chunks: the teacher's, where they are on these ranks, whatever their role; None on those of a student whose teacher is elsewhere. The bf16
    teacher is loaded beside it for the while, 2 bytes a parameter. Reached by all ranks of each role.
    """
    text, bridge = None, job.world.bridge
    if job.recipe.teacher.fp8 is None:
        return None
    if chunks is not None:
        text = _measure(job, chunks)
    if bridge is not None:
        text = bridge.exchange("drift", text, timeout_s=None, roles=["teacher", *job.students])["teacher"]
    if text is not None:
        say(text)
    return text


def _measure(job: Job, chunks: list[Any]) -> str:
    _, groups = job.groups("valid", SAMPLES, job.recipe.distill.micro_batch_size, exact=False)
    quality = compare(
        {"fp8": chunks}, job.teacher(), groups, job.world, vocab_size=job.arch(job.recipe.tutor).vocab_size
    )
    exact, rough = quality["teacher"], quality["fp8"]
    name = job.recipe.teacher.fp8
    return f"teacher in FP8 ({name}): KL(bf16 || FP8) {rough.kl:.5f} on {exact.num_tokens:,} tokens, loss {rough.loss:.4f}, in bf16 {exact.loss:.4f}"
