"""The error of an FP8 teacher: KL(bf16 teacher || FP8 teacher), logged before distillation."""

from __future__ import annotations

from minitron_mp.console import say
from minitron_mp.evaluation.quality import compare
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.workflow.context import StageContext

KL_SAMPLES = 4
"""Samples of held-out text: 4 x 8192 tokens at the published sequence length."""


def log_fp8_teacher_kl(context: StageContext, model: ShardedModel | None) -> str | None:
    """Log the KL of the FP8 teacher on rank 0 and return the logged line; None without FP8.

    Called on all ranks of each role. model: the teacher on the ranks that hold it, None on the
    ranks of a student with a remote teacher. The bf16 teacher is loaded beside it, 2 bytes per
    parameter.
    """
    if context.recipe.teacher.fp8 is None:
        return None
    line = None if model is None else _measure(context, model)
    channel = context.world.channel
    if channel is not None:
        roles = ["teacher", *context.students]
        line = channel.exchange("FP8 teacher KL", line, timeout_s=None, roles=roles)["teacher"]
    if line is not None:
        say(line)
    return line


def _measure(context: StageContext, model: ShardedModel) -> str:
    """Return a line with the KL and the losses of both teachers on held-out text."""
    _, groups = context.groups("valid", KL_SAMPLES, context.recipe.distill.micro_batch_size, exact=False)
    quality = compare({"fp8": model}, context.teacher(), groups)
    bf16, fp8 = quality["teacher"], quality["fp8"]
    return (
        f"teacher in FP8 ({context.recipe.teacher.fp8}): KL(bf16 || FP8) {fp8.kl:.5f} on "
        f"{bf16.num_tokens:,} tokens, loss {fp8.loss:.4f}, in bf16 {bf16.loss:.4f}"
    )
