"""Keep the GPU packages of the base image when the Dockerfile runs pip.

    python3 docker/base_stack.py write FOLDER     before pip: write the files below
    python3 docker/base_stack.py check FOLDER     after pip: fail if a package of the base changed

requirements.txt has the core dependencies of setup.py. constraints.txt has the base image's versions
of the GPU packages, and the tested versions of constraints/ for all other packages. stack.json has
the versions and folders of the GPU packages. The base image's Python runs this file, so it imports
only the standard library.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

STACK = re.compile(
    r"(torch|torchvision|torchao|pytorch-triton|triton|numpy|transformer-engine.*|apex|flash-attn.*"
    r"|nvidia-.*|cuda-.*)"
)
"""Packages that are built for the CUDA of the base image, and numpy.

numpy is included, because compiled extensions depend on its major version.
"""
ROOT = Path(__file__).parents[1]


def installed() -> dict[str, tuple[str, str]]:
    """Return GPU package -> (version, folder) that this Python imports."""
    packages: dict[str, tuple[str, str]] = {}
    for distribution in distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if STACK.fullmatch(name):
            packages.setdefault(name, (distribution.version, str(distribution.locate_file(""))))
    return packages


def write(folder: Path) -> None:
    """Write requirements.txt, constraints.txt and stack.json."""
    folder.mkdir(parents=True, exist_ok=True)
    stack = installed()
    if "torch" not in stack:
        sys.exit(
            "the base image has no torch; use another one: "
            "--build-arg BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3"
        )
    pins = (
        (ROOT / "constraints" / f"py{sys.version_info.major}{sys.version_info.minor}.txt")
        .read_text()
        .splitlines()
    )
    other_pins = [pin for pin in pins if not pin.startswith("#") and not STACK.fullmatch(pin.split("==")[0])]
    (folder / "constraints.txt").write_text(
        "\n".join([*(f"{name}=={version}" for name, (version, _) in stack.items()), *other_pins]) + "\n"
    )
    tables = {
        node.targets[0].id: node.value
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign)
    }
    (folder / "requirements.txt").write_text("\n".join(ast.literal_eval(tables["CORE"])) + "\n")
    (folder / "stack.json").write_text(json.dumps(stack, indent=1))


def check(folder: Path) -> None:
    """Exit with an error if a GPU package has changed since write()."""
    before, now = json.loads((folder / "stack.json").read_text()), installed()
    changed = [name for name, package in before.items() if tuple(package) != now.get(name)]
    if changed:
        rows = [
            f"{name}: {' in '.join(before[name])}, now {' in '.join(now.get(name, ('none', 'nowhere')))}"
            for name in changed
        ]
        sys.exit("pip has replaced packages of the base image; use another BASE_IMAGE:\n" + "\n".join(rows))
    print("unchanged: " + ", ".join(f"{name} {version}" for name, (version, _) in before.items()))


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
