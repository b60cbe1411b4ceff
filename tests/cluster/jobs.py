"""The recipe of the cluster's tests, and the command that submits it."""

from __future__ import annotations

from pathlib import Path

from slurm import Cluster
from tiny import ROOT, make_recipe_file

LAYOUT = {"tp": 2}
STEPS, INTERVAL = 48, 16

AFTER_PRUNING = (
    "student_*",
    "evaluation.json",
    "report.*",
    "metrics*",
    "tensorboard",
    "finished",
    "resolved_recipe.yaml",
)
"""Files that a copy of an output folder leaves out, so that it distils again."""


def recipe(project: Path, output: str) -> Path:
    """Write a recipe of the project with its own output folder."""
    training = {"steps": STEPS, "checkpoint_interval": INTERVAL}
    return make_recipe_file(
        project / f"{output}.yaml",
        project / "model",
        project / "text",
        project / output,
        parallel=LAYOUT,
        distill=training,
    )


def submit(slurm: Cluster, *words: str | Path, options: tuple[str, ...] = (), **variables: str) -> int:
    given = ("--nodes=2", "--gpus-per-node=8", "--time=20", *options)
    return slurm.submit(*given, ROOT / "launch" / "slurm.sbatch", "--ranks", "2", *words, **variables)
