"""examples/with_nemo_run.py: NeMo-Run's SlurmExecutor starts a stage on two nodes.

The stage starts as a Python function and as a command line. MINITRON_NEMO_PYTHON: a Python with
nemo-run and minitron_mp's dependencies; the default is the one that runs the tests.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from jobs import AFTER_PRUNING, recipe
from tiny import ROOT, read_metrics

PYTHON = os.environ.get("MINITRON_NEMO_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def nemo(slurm, tmp_path_factory):
    """Call nemo(form, stage, recipe, options) to get the log of NeMo-Run's job.

    With --dry-run there is no job, and it returns the printed text.
    """
    done = subprocess.run([PYTHON, "-c", "import nemo_run, torch"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(
            f"{PYTHON} cannot import nemo_run (set MINITRON_NEMO_PYTHON; see docs/cluster.md): "
            f"{done.stderr.strip().splitlines()[-1]}"
        )
    home, programs = tmp_path_factory.mktemp("nemo"), tmp_path_factory.mktemp("bin")
    for name, words in (("python", ""), ("torchrun", "-m torch.distributed.run ")):
        (programs / name).write_text(f'#!/bin/sh\nexec {PYTHON} {words}"$@"\n')
        (programs / name).chmod(0o755)
    variables = {
        "NEMORUN_HOME": str(home),
        "PATH": f"{programs}:{slurm.environment['PATH']}",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    where = ["--nodes", "2", "--ranks", "2", "--partition", "batch", "--account", "me", "--time", "00:20:00"]

    def submit(form, stage, file, *options):
        before = slurm.jobs()
        said = slurm.run(
            "python",
            ROOT / "examples" / "with_nemo_run.py",
            file,
            stage,
            "--form",
            form,
            *where,
            *options,
            timeout_s=200,
            **variables,
        )
        jobs = set(slurm.jobs()) - set(before)
        if "--dry-run" in options:
            assert not jobs
            return said
        (job,) = jobs
        slurm.wait(lambda: slurm.ended(job), job, 200)
        log = "\n".join(path.read_text() for path in home.rglob("*.out"))
        assert slurm.job(job)["JobState"] == "COMPLETED", log[-4000:]
        return log

    return submit


def test_partial_and_script_match_slurm_sbatch(nemo, unbroken, project):
    """run.Partial distils, run.Script evaluates.

    Curve and figures are those of launch/slurm.sbatch.
    """
    _, whole = unbroken
    output = project / "nemo"
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns(*AFTER_PRUNING))
    file = recipe(project, "nemo")
    nemo("partial", "distill", file)
    assert read_metrics(output) == read_metrics(whole)
    nemo("script", "evaluate", file)
    losses = [
        json.loads((folder / "evaluation.json").read_text())["distilled"]["loss"]
        for folder in (output, whole)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("form", ["partial", "script"])
def test_dry_run_prints_the_script(nemo, project, form):
    said = "".join(nemo(form, "distill", recipe(project, "nemo"), "--dry-run").split())
    for line in (
        "#SBATCH --account=me",
        "#SBATCH --nodes=2",
        "#SBATCH --partition=batch",
        "--nproc-per-node",
    ):
        assert line.replace(" ", "") in said, said
