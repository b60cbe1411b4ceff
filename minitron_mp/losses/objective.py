"""The objective of the distillation loss, and the teacher's targets that it accepts.

s sequence  b microbatch  v padded vocabulary  h_t hidden size of the teacher
s' is s/cp, or s/cp/tp under sequence parallelism
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minitron_mp.errors import refuse
from minitron_mp.losses.divergences import DIVERGENCES
from minitron_mp.losses.parameters import complete_parameters


@dataclass(frozen=True)
class Objective:
    """Weights of the loss. In a recipe they are fields of config.distillation.DistillConfig.

    Both weights may be 0, for an evaluation that needs the statistics of the tokens only.
    """

    divergence: str = "forward_kl"
    """A key of divergences.DIVERGENCES."""
    temperature: float = 1.0
    kl_weight: float = 1.0
    """Weight of the divergence. The loss also multiplies it by the temperature squared."""
    ce_weight: float = 0.0
    """Weight of the cross-entropy with the labels."""
    logits_dtype: torch.dtype = torch.float32
    """Dtype of the logits between the matrix product and the sums over a row. With bf16 inputs and
    131072 columns, bf16 logits are a little faster, but the error of the gradient is 10 times the
    error with float32 logits."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Parameters of the divergence by name, see parameters.PARAMETERS. Missing ones get their
    defaults."""

    def __post_init__(self) -> None:
        """Complete the parameters. InputError lists every value that is not allowed."""
        problems = []
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            problems.append(f"temperature is {self.temperature:g}; give a number above 0")
        for name in ("kl_weight", "ce_weight"):
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                problems.append(f"{name} is {weight:g}; give a number of at least 0")
        if self.divergence not in DIVERGENCES:
            problems.append(f"divergence is {self.divergence!r}; give one of {', '.join(DIVERGENCES)}")
        else:
            try:
                parameters = complete_parameters(self.divergence, self.parameters)
            except ValueError as error:
                problems += str(error).split("\n")
            else:
                object.__setattr__(self, "parameters", parameters)
        refuse("the objective cannot be used:", problems)


@dataclass(frozen=True)
class TeacherHidden:
    """Hidden states and output layer of a teacher. The loss computes the logits tile by tile.

    hidden [s', b, h_t]: output of the final norm. weight [v_t/tp, h_t]: the same columns of the
    vocabulary as the student has on this rank (the padding may differ).
    """

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class TeacherLogits:
    """Logits of a teacher.

    logits [s/cp, b, v_t/tp]: the same columns of the vocabulary as the student has on this rank
    (the padding may differ).
    """

    logits: Tensor


@dataclass(frozen=True)
class TeacherTopK:
    """The k most likely tokens at the temperature of the loss, equal on all tensor-parallel ranks.

    indices int64 [s', b, k]: ids in the whole vocabulary. log_probs float32 [s', b, k]: their log
    probabilities. log_ghost float32 [s', b, 1]: log of the probability of all remaining tokens,
    -inf when k covers the vocabulary.
    """

    indices: Tensor
    log_probs: Tensor
    log_ghost: Tensor


TeacherTarget = TeacherHidden | TeacherLogits | TeacherTopK
