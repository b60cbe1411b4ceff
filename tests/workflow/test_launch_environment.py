"""Variables of launch/env.sh, and roles of nodes; no ranks, no Slurm."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_launch_scripts import ROOT

from minitron_mp.cluster.environment import Node, environment_lines, role_lines
from minitron_mp.config.recipe import make_recipe
from minitron_mp.errors import InputError

NODE = Node(ranks=8, cores=64, scratch=Path("/scratch"))


def recipe(**sections):
    return make_recipe({"model": "m", "output": "a folder/out's", **sections})


def names(**sections) -> set[str]:
    return {
        line.split("=")[0]
        for line in environment_lines(recipe(**sections), NODE, 1)
        if line.startswith("export")
    }


def evaluated(text: str, **environment: str) -> dict[str, str]:
    """The environment of a shell after it."""
    words = ["bash", "-c", 'set -eu; eval "$1"; env -0', "-", text]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin", **environment}
    )
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)


def test_output_can_be_evaluated_by_a_shell():
    found = evaluated("\n".join(environment_lines(recipe(parallel={"tp": 2}), NODE, 4)))
    assert found["MINITRON_OUTPUT"] == str(Path("a folder/out's").absolute())
    assert found["OMP_NUM_THREADS"] == "8"
    assert found["TRITON_CACHE_DIR"] == "/scratch/triton"
    assert found["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def test_each_variable_has_a_reason():
    assert all("  # " in line for line in environment_lines(recipe(), NODE, 1) if line.startswith("export"))


def test_variables_depend_on_the_recipe():
    one_queue = {"export CUDA_DEVICE_MAX_CONNECTIONS"}
    plain = names()
    assert not one_queue & plain
    for parallel in ({"tp": 2}, {"cp": 2}):
        assert names(parallel=parallel) - plain == one_queue
    assert names(parallel={"pp": 2}) == plain
    assert names(teacher={"placement": "remote", "parallel": {"tp": 2}}) - plain == one_queue
    overlap = names(distill={"overlap": True}) - plain
    assert overlap == {
        "export TORCH_NCCL_HIGH_PRIORITY",
        "export NVTE_FWD_LAYERNORM_SM_MARGIN",
        "export NVTE_BWD_LAYERNORM_SM_MARGIN",
    }
    assert names(correct={"overlap": True}) - plain == overlap


def test_roles_and_nodes():
    remote = {"placement": "remote", "ranks": 16, "parallel": {"tp": 8}}
    assert role_lines(recipe(parallel={"tp": 4}), 4, 8) == ["job: ranks 0 to 31, nodes 0 to 3"]
    assert role_lines(recipe(parallel={"tp": 8}, teacher=remote), 6, 8) == [
        "student: ranks 0 to 31, nodes 0 to 3",
        "teacher: ranks 32 to 47, nodes 4 to 5",
    ]
    student, teacher = role_lines(recipe(teacher={"placement": "remote", "ranks": 4}), 2, 8)
    assert student.startswith("student: ranks 0 to 11, nodes 0 to 1, shares a node")
    assert teacher.startswith("teacher: ranks 12 to 15, nodes 1 to 1, shares a node")
    assert "shares a node" not in role_lines(recipe(teacher={"placement": "remote", "ranks": 4}), 1, 8)[0]
    assert (
        role_lines(recipe(teacher={"placement": "remote", "student_ranks": 8}), 3, 8)[1]
        == "teacher: ranks 8 to 23, nodes 1 to 2"
    )


@pytest.mark.parametrize(
    ("sections", "nodes", "said"),
    [
        ({"parallel": {"tp": 3}}, 2, "16 ranks; tp x pp x cp needs a multiple of 3"),
        ({"teacher": {"placement": "remote", "ranks": 16}}, 2, r"0 \(student\) \+ 16 \(teacher\)"),
        (
            {"teacher": {"placement": "remote", "student_ranks": 9, "parallel": {"tp": 2}}},
            2,
            "the teacher has 7 ranks",
        ),
    ],
)
def test_roles_that_do_not_fit_are_rejected(sections, nodes, said):
    with pytest.raises(InputError, match=said):
        role_lines(recipe(**sections), nodes, 8)


def test_existing_variables_are_kept(tmp_path):
    """launch/env.sh: site and user settings precede the recipe's, and are printed with a reason."""
    (tmp_path / "site.env").write_text("OMP_NUM_THREADS=3\nNCCL_DEBUG=WARN\n")
    (tmp_path / "recipe.yaml").write_text("model: m\noutput: out\n")
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    given = {
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "MINITRON_SITE": str(tmp_path / "site.env"),
        "PYTHONUNBUFFERED": "2",
    }
    script = 'set -eu; . "$0/launch/env.sh" "$1" distill.overlap=true; env'
    done = subprocess.run(
        ["bash", "-c", script, ROOT, tmp_path / "recipe.yaml"], capture_output=True, text=True, env=given
    )
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert {
        "OMP_NUM_THREADS=3",
        "NCCL_DEBUG=WARN",
        "PYTHONUNBUFFERED=2",
        "TORCH_NCCL_HIGH_PRIORITY=1",
        "TORCH_FR_BUFFER_SIZE=2000",
        f"TORCH_FR_DUMP_TEMP_FILE={Path.cwd() / 'out' / 'logs' / 'nccl_trace_rank_'}",
    } <= set(rows)
    assert any(row.startswith("OMP_NUM_THREADS=3  # ") for row in rows)
    refused = subprocess.run(
        ["bash", "-c", script + "; echo reached", ROOT, tmp_path / "none.yaml"],
        capture_output=True,
        text=True,
        env=given,
    )
    assert (refused.returncode, "reached" in refused.stdout) == (2, False)
    assert "no recipe at" in refused.stderr
