"""A Slurm cluster for all tests here, a project on it, and an uninterrupted run."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from jobs import SHARES, recipe, submit
from slurm import cluster, why_not
from tiny import ROOT, make_model, make_text

SITE = """GLOO_SOCKET_IFNAME=lo
MINITRON_MARGIN_S=120
MINITRON_DOCTOR=no
TORCH_ELASTIC_SHUTDOWN_TIMEOUT=10
"""


@pytest.fixture(scope="session")
def slurm():
    """A cluster of two nodes that run the Python of this process."""
    if reason := why_not():
        pytest.skip(reason)

    def interrupt(*_):
        # SIGTERM, for example from timeout(1): pytest then closes the fixtures, and no process
        # stays.
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    with cluster() as made:
        site = made.root / "site.env"
        site.write_text(SITE)
        paths = {
            "PATH": f"{Path(sys.executable).parent}:{made.environment['PATH']}",
            "PYTHONPATH": f"{ROOT}:{made.environment.get('PYTHONPATH', '')}",
        }
        made.environment |= paths | {
            "MINITRON_SITE": str(site),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONWARNINGS": "ignore",
            "NO_COLOR": "1",
        }
        yield made


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """A folder with a model, texts and recipe.yaml."""
    root = tmp_path_factory.mktemp("project")
    make_model(root / "model")
    for name in ("calibration", "valid", *SHARES):
        make_text(root / "text" / name, num_files=40 if name in SHARES else 12)
    recipe(root, "unbroken")
    return root


@pytest.fixture(scope="session")
def unbroken(slurm, project) -> tuple[int, Path]:
    """Return (job, output) of `compress` over two nodes, in a container according to pyxis."""
    image = {"MINITRON_IMAGE": "nvcr.io#nvidia/pytorch:26.06-py3", "MINITRON_MOUNTS": "/models:/models:ro"}
    job = submit(slurm, "compress", project / "unbroken.yaml", **image)
    slurm.wait(lambda: slurm.ended(job), job, 300)
    return job, project / "unbroken"
