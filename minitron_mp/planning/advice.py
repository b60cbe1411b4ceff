"""Advice of the command `estimate`: a warning about the host, and the settings of a layout."""

from __future__ import annotations

from collections.abc import Iterator

from minitron_mp.config.base import Section
from minitron_mp.config.recipe import Recipe
from minitron_mp.planning.estimate import Estimate
from minitron_mp.planning.model_pass import host_load
from minitron_mp.planning.step_time import training_pass
from minitron_mp.planning.times import Times

CLOSE = 0.5
"""Share of a layer's GPU time that the host needs to issue it, from which on a slower host may
limit the speed: a virtual machine takes twice as long.
"""

LAYOUT_KEYS = {
    "parallel": ("tp", "pp", "cp", "vpp", "sequence_parallel", "layers"),
    "distill": (
        "steps",
        "global_batch_size",
        "micro_batch_size",
        "overlap",
        "tp_comm_overlap",
        "recompute",
        "cuda_graphs",
        "fp8",
    ),
    "teacher": ("placement", "ranks", "student_ranks", "payload", "top_k", "window", "timeout_s", "fp8"),
    "teacher.parallel": ("tp", "pp", "cp", "vpp", "sequence_parallel"),
}
"""Section -> keys that a layout of the search may change. `correct` has the keys of `distill`."""


def host_warning(estimate: Estimate, times: Times) -> str | None:
    """Return a warning if the host limits the speed of the student's layers, or nearly does."""
    recipe, case = estimate.recipe, estimate.case
    issue_s, gpu_s = host_load(training_pass(case.student, recipe.distill, recipe), times)
    if issue_s <= CLOSE * gpu_s:
        return None
    numbers = f"it needs {issue_s * 1e3:.1f} ms to issue a layer, the GPU {gpu_s * 1e3:.1f} ms to compute it"
    remedies = "raise distill.micro_batch_size, lower parallel.tp or parallel.cp"
    if not recipe.distill.cuda_graphs:
        remedies += ", or set distill.cuda_graphs (without recompute)"
    if issue_s > gpu_s:
        return f"the host limits the speed: {numbers}; {remedies}"
    return (
        f"the host may limit the speed: {numbers}, and a virtual machine needs about twice as long; "
        f"measure host_ms_per_layer (docs/planning.md), or {remedies}"
    )


def settings_text(estimate: Estimate, recipe: Recipe) -> str:
    """Return the overrides that turn a recipe into that of an estimate: "parallel.tp=2 ..."."""
    return " ".join(_changes(estimate.recipe, recipe)) or "those of the recipe"


def _changes(new: Recipe, old: Recipe) -> Iterator[str]:
    for section, keys in LAYOUT_KEYS.items():
        names = [section, "correct"] if section == "distill" and old.correct else [section]
        for name in names:
            after, before = _section(new, name), _section(old, name)
            for key in keys:
                value = getattr(after, key)
                if value != getattr(before, key):
                    yield f"{name}.{key}={_yaml(value)}"


def _section(recipe: Recipe, name: str) -> Section:
    found: Section = recipe
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
