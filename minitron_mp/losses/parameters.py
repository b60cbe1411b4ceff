"""Parameters of the divergences: name, default and limits. Also which divergences need two passes.

This file does not import torch, so that the schema of the recipe and the planner can use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """A number with above < value <= at_most."""

    default: float
    above: float
    at_most: float


PARAMETERS: dict[str, dict[str, Parameter]] = {
    "skewed_forward_kl": {"skew": Parameter(0.1, above=0, at_most=0.99)},
}
"""Divergence -> its parameters by name. Divergences that are not listed have none.

The kernels of kernels.py have an argument with the name of each parameter.

skew: the divergence is proportional to (1 - skew)^2 when teacher and student are close. Above 0.99,
float32 rounding errors are as large as the divergence.
"""


SECOND_PASS = {"skewed_forward_kl", "js"}
"""Divergences with Divergence.second_sums: they read the logits once more."""


def complete_parameters(divergence: str, given: Mapping[str, float]) -> dict[str, float]:
    """Return all parameters of a divergence: the given values, and defaults for the others.

    ValueError for a name that the divergence does not have, or a value outside of the limits.
    """
    declared = PARAMETERS.get(divergence, {})
    problems = []
    for name, value in given.items():
        if name not in declared:
            allowed = f"its parameters: {', '.join(declared)}" if declared else "it has no parameters"
            problems.append(f"{divergence} has no parameter {name}; {allowed}; drop {name}")
        elif not declared[name].above < value <= declared[name].at_most:
            limits = declared[name]
            problems.append(
                f"{name} of {divergence} is {value:g}; "
                f"give a number above {limits.above:g} and at most {limits.at_most:g}"
            )
    if problems:
        raise ValueError("\n".join(problems))
    return {name: float(given.get(name, parameter.default)) for name, parameter in declared.items()}
