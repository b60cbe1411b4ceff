"""The Dockerfile, built with buildah on a stand-in for NVIDIA's image, and run as its user.

The stand-in is Debian 12 from debootstrap with its Python 3.11, PyTorch's CPU build and a numpy
that differs from the pinned one. The tests show that the base's packages are unchanged. NVIDIA's
image itself is not pulled. The tests need root, buildah, debootstrap and a network; run them with
tests/run.sh --docker. All files lie below pytest's temporary folder and are deleted at the end: 4
GB at most.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import ROOT, make_model, make_recipe_file, make_text

BASE, IMAGE = "localhost/stand-in", "localhost/minitron-mp"
NUMPY = "2.3.5"
"""numpy version of the stand-in."""
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
Buildah = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def buildah(tmp_path_factory) -> Iterator[Buildah]:
    """buildah(words...) runs buildah with temporary storage."""
    if os.geteuid():
        pytest.skip("needs root: buildah runs builds in a chroot")
    for program in ("buildah", "debootstrap"):
        if not shutil.which(program):
            pytest.skip(f"needs {program}: apt-get install buildah debootstrap")
    root = tmp_path_factory.mktemp("buildah")
    if (free := shutil.disk_usage(root).free) < 6e9:
        pytest.skip(f"needs 6 GB below {root}, {free / 1e9:.1f} are free")
    (root / "tmp").mkdir()
    places = ["--root", str(root / "storage"), "--runroot", str(root / "run"), "--storage-driver", "vfs"]

    def run(*words: object, check: bool = True, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"TMPDIR": str(root / "tmp")}
        done = subprocess.run(
            ["buildah", *places, *map(str, words)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0 or not check, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    try:
        yield run
    finally:
        run("rm", "--all", check=False)
        run("rmi", "--all", "--force", check=False)
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def base(buildah, tmp_path_factory) -> str:
    """The stand-in for NVIDIA's image."""
    context = tmp_path_factory.mktemp("base")
    rootfs, pins = context / "rootfs", (ROOT / "constraints" / "py311.txt").read_text()
    torch = re.search(r"^torch==(\S+)$", pins, re.M)
    assert torch
    command = [
        "debootstrap",
        "--variant=minbase",
        "--include=python3,python3-pip,ca-certificates",
        "bookworm",
        rootfs,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    finally:
        for mount in ("proc", "sys"):  # which it leaves when it is stopped
            subprocess.run(["umount", "-q", "-R", rootfs / mount])
    if done.returncode:
        pytest.skip(f"debootstrap cannot make Debian 12 here: {(done.stdout + done.stderr).strip()[-300:]}")
    packages = rootfs / "usr" / "local" / "lib" / "python3.11" / "dist-packages"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "--python-version",
        "3.11",
        "--only-binary",
        ":all:",
        "--target",
        packages,
    ]
    wanted = [f"torch=={torch[1]}+cpu", f"numpy=={NUMPY}"]
    for index in ([], ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]):
        done = subprocess.run([*install, *index, *wanted], capture_output=True, text=True, timeout=600)
        if done.returncode == 0:
            break
    else:
        pytest.skip(f"{wanted[0]} cannot be had for Python 3.11: {done.stderr.strip()[-300:]}")
    subprocess.run(["tar", "-C", rootfs, "-cf", context / "rootfs.tar", "."], check=True)
    shutil.rmtree(rootfs)
    (context / "Dockerfile").write_text(
        "FROM scratch\nADD rootfs.tar /\nENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin\n"
    )
    buildah("bud", "--isolation", "chroot", "--format", "docker", "--tag", BASE, context)
    shutil.rmtree(context)
    return BASE


@pytest.fixture(scope="module")
def image(buildah, base) -> str:
    certificates = [
        "--volume",
        "/etc/ssl/certs:/run/host-certs:ro",
        "--build-arg",
        "PIP_CERT=/run/host-certs/ca-certificates.crt",
    ]
    words = [
        "--isolation",
        "chroot",
        "--format",
        "docker",
        "--network",
        "host",
        *(certificates if CERTIFICATES.is_file() else []),
    ]
    done = buildah(
        "bud",
        *words,
        "--build-arg",
        f"BASE_IMAGE={base}",
        "--build-arg",
        "REVISION=abc",
        "--tag",
        IMAGE,
        ROOT,
    )
    assert re.search(rf"unchanged: .*numpy {NUMPY}", done.stdout), done.stdout[-2000:]
    return IMAGE


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Model, text and recipe that any user can read and write.

    The recipe has paths in the container.
    """
    root = tmp_path_factory.mktemp("project")
    make_model(root / "model")
    make_text(root / "text")
    make_recipe_file(
        root / "recipe.yaml", Path("/project/model"), Path("/project/text"), Path("/project/out")
    )
    for path in (root, *root.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    return root


@pytest.fixture(scope="module")
def inside(buildah, image, project) -> Callable[..., subprocess.CompletedProcess[str]]:
    """inside(words...) runs a command as the user of the image, with the project at /project."""
    container = buildah("from", image).stdout.strip()
    options = [
        "--isolation",
        "chroot",
        "--hostname",
        "localhost",
        "--volume",
        f"{project}:/project",
        "--env",
        "OMP_NUM_THREADS=1",
        "--env",
        "COLUMNS=250",
    ]
    return lambda *words, check=True: buildah(
        "run", *options, container, "--", *words, check=check, timeout_s=300
    )


def test_image_metadata(buildah, image):
    config = json.loads(buildah("inspect", "--type", "image", image).stdout)["Docker"]["config"]
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Test"] == ["CMD", "minitron-mp", "doctor"]
    labels = {
        name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()
    }
    assert labels["title"] == "minitron-mp"
    assert labels["licenses"] == "Apache-2.0"
    assert labels["revision"] == "abc"
    assert labels["base.name"] == BASE
    assert not config.get("Entrypoint")  # the base's own stays


def test_stack_is_the_base_images_and_user_is_unprivileged(inside):
    where = (
        "import torch, numpy, minitron_mp; "
        "print(torch.__file__, numpy.__version__, numpy.__file__, minitron_mp.__file__)"
    )
    torch, version, numpy, ours = inside("python", "-c", where).stdout.split()
    assert torch.startswith("/usr/local/lib/python3.11/dist-packages/")
    assert numpy.startswith("/usr/local/lib/python3.11/dist-packages/")
    assert version == NUMPY
    assert ours.startswith("/opt/venv/")
    folders = (
        "$HOME $HF_HOME $TRITON_CACHE_DIR $TORCHINDUCTOR_CACHE_DIR $MPLCONFIGDIR $XDG_CACHE_HOME /workspace"
    )
    assert inside(
        "bash", "-c", f'for d in {folders}; do touch "$d/x" && rm "$d/x"; done; id -u; pwd'
    ).stdout.split() == ["10001", "/workspace"]
    assert inside("bash", "-c", "touch /opt/venv/x", check=False).returncode


def test_health_check(inside):
    start = time.monotonic()
    done = inside("minitron-mp", "doctor")
    assert "0 failed" in done.stdout
    assert "in their supported ranges" in done.stdout  # installed, so that the metadata are there
    assert time.monotonic() - start < 60, "the Dockerfile gives it 60 s"


def test_failed_health_check(inside):
    done = inside("minitron-mp", "doctor", "/project/recipe.yaml", "data.tokenizer=/nowhere", check=False)
    assert done.returncode == 1, done.stderr
    assert "data.tokenizer: /nowhere does not exist" in done.stdout


def test_torchrun_uses_the_virtual_environment(inside):
    """The base's torchrun would start the base's Python, which does not have the library."""
    done = inside(
        "torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "minitron_mp",
        "doctor",
        "/project/recipe.yaml",
    )
    assert "gloo, 2 ranks on 1 hosts" in done.stdout
    assert "0 failed" in done.stdout


def test_tiny_pipeline(inside, project):
    inside("minitron-mp", "compress", "/project/recipe.yaml")
    for name in ("report.html", "student_hf/model.safetensors"):
        assert (project / "out" / name).stat().st_uid == 10001
