"""A Slurm for all tests here, a project on it, and the curve of a run that nothing has disturbed."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny.py

from slurm import Cluster, cluster, why_not
from tiny import ROOT, make_model, make_recipe_file, make_text

LAYOUT = {"tp": 2}
STEPS, INTERVAL = 48, 16


@pytest.fixture(scope="session")
def slurm():
    """Two nodes that run the Python of this process."""
    if reason := why_not():
        pytest.skip(reason)

    def interrupt(*_):
        raise KeyboardInterrupt  # SIGTERM, for example of timeout(1): pytest then leaves the fixtures, and nothing goes on running

    signal.signal(signal.SIGTERM, interrupt)
    with cluster() as made:
        site = made.root / "site.env"
        site.write_text("GLOO_SOCKET_IFNAME=lo\nMINITRON_MARGIN_S=120\n")
        paths = {"PATH": f"{Path(sys.executable).parent}:{made.environment['PATH']}", "PYTHONPATH": f"{ROOT}:{made.environment.get('PYTHONPATH', '')}"}
        made.environment |= paths | {"MINITRON_SITE": str(site), "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", "NO_COLOR": "1"}
        yield made


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """A folder with a model, a text and recipe.yaml."""
    root = tmp_path_factory.mktemp("project")
    make_model(root / "model")
    make_text(root / "text")
    recipe(root, "unbroken")
    return root


def recipe(project: Path, output: str) -> Path:
    """A recipe of the project's with an output folder of its own."""
    training = {"steps": STEPS, "checkpoint_interval": INTERVAL}
    return make_recipe_file(project / f"{output}.yaml", project / "model", project / "text", project / output, parallel=LAYOUT, distill=training)


def submit(slurm: Cluster, *words: str | Path, options: tuple[str, ...] = (), **variables: str) -> int:
    given = ("--nodes=2", "--gpus-per-node=8", "--time=20", *options)
    return slurm.submit(*given, ROOT / "launch" / "slurm.sbatch", "--ranks", "2", *words, **variables)


@pytest.fixture(scope="session")
def unbroken(slurm, project) -> tuple[int, Path]:
    """(job, output) of `compress` over two nodes, in a container as far as pyxis is told."""
    image = {"MINITRON_IMAGE": "nvcr.io#nvidia/pytorch:26.06-py3", "MINITRON_MOUNTS": "/models:/models:ro"}
    job = submit(slurm, "compress", project / "unbroken.yaml", **image)
    slurm.wait(lambda: slurm.ended(job), job, 300)
    return job, project / "unbroken"
