"""The curves of training runs: the names of their metrics files, and their titles in the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """The metrics of all steps of one training run."""

    name: str
    """Section of the recipe with the settings of the run. TensorBoard uses the same name."""
    title: str
    """Title of the section in the report."""
    file: str
    """File beside the artifacts. The artifact of the stage has a copy of the complete file."""


CORRECTION = Curve("correct", "Teacher correction", "metrics_correct.jsonl")
DISTILLATION = Curve("distill", "Distillation", "metrics.jsonl")
