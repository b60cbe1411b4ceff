"""The recipe of the cluster's tests, and the command that submits it."""

from __future__ import annotations

from pathlib import Path

import yaml
from slurm import Cluster
from tiny import ROOT, make_recipe_file

LAYOUT = {"tp": 2}
STEPS, INTERVAL = 48, 10
BATCH = 4
SHARES = {"web": 3, "code": 2, "math": 1}
"""Weights of the texts of the training part."""
FAULTS = Path(__file__).with_name("faults")
"""Folder of a sitecustomize.py that injects faults."""

AFTER_PRUNING = (
    "student_*",
    "evaluation.json",
    "report.*",
    "metrics*",
    "tensorboard",
    "finished",
    "resolved_recipe.yaml",
    "checkpoints",
    "logs",
)
"""Files that a copy of an output folder leaves out, so that it distils again."""


def recipe(project: Path, output: str) -> Path:
    """Write a recipe of the project with its own output folder: a blend, and validations."""
    path = make_recipe_file(
        project / f"{output}.yaml",
        project / "model",
        project / "text",
        project / output,
        parallel=LAYOUT,
        distill={
            "steps": STEPS,
            "global_batch_size": BATCH,
            "checkpoint_interval": INTERVAL,
            "valid_interval": INTERVAL,
            "valid_batches": 2,
        },
    )
    values = yaml.safe_load(path.read_text())
    values["data"] = {
        "calibration": [str(project / "text" / "calibration")],
        "train": {str(project / "text" / name): weight for name, weight in SHARES.items()},
        "valid": [str(project / "text" / "valid")],
        "sequence_length": 32,
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def submit(slurm: Cluster, *words: str | Path, options: tuple[str, ...] = (), **variables: str) -> int:
    given = ("--nodes=2", "--gpus-per-node=8", "--time=20", *options)
    return slurm.submit(*given, ROOT / "launch" / "slurm.sbatch", "--ranks", "2", *words, **variables)


def with_faults(environment: dict[str, str], **faults: str) -> dict[str, str]:
    """Return the variables that inject faults: names without the prefix MINITRON_TEST_."""
    path = f"{FAULTS}:{environment.get('PYTHONPATH', '')}"
    return {"PYTHONPATH": path} | {f"MINITRON_TEST_{name}": value for name, value in faults.items()}
