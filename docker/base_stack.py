"""Keep the GPU packages of the base image when the Dockerfile runs pip.

    python3 docker/base_stack.py write FOLDER     before pip: write the files below
    python3 docker/base_stack.py check FOLDER     after pip: fail if a package of the base changed

requirements.txt has the core dependencies of setup.py. constraints.txt has the base's versions of
the GPU packages, and the tested versions of constraints/ for all others. stack.json has versions
and places of the GPU packages. The base's Python runs this file, so it uses only the standard
library.
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
"""Packages that are built for the base's CUDA, and numpy.

Extensions need numpy's major version.
"""
ROOT = Path(__file__).parents[1]


def installed() -> dict[str, tuple[str, str]]:
    """Return name of each GPU package -> (version, folder), as this Python finds it first."""
    found: dict[str, tuple[str, str]] = {}
    for distribution in distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if STACK.fullmatch(name):
            found.setdefault(name, (distribution.version, str(distribution.locate_file(""))))
    return found


def write(folder: Path) -> None:
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
    others = [pin for pin in pins if not pin.startswith("#") and not STACK.fullmatch(pin.split("==")[0])]
    (folder / "constraints.txt").write_text(
        "\n".join([*(f"{name}=={version}" for name, (version, _) in stack.items()), *others]) + "\n"
    )
    tables = {
        node.targets[0].id: node.value
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign)
    }
    (folder / "requirements.txt").write_text("\n".join(ast.literal_eval(tables["CORE"])) + "\n")
    (folder / "stack.json").write_text(json.dumps(stack, indent=1))


def check(folder: Path) -> None:
    before, now = json.loads((folder / "stack.json").read_text()), installed()
    changed = [name for name, was in before.items() if tuple(was) != now.get(name)]
    if changed:
        rows = [
            f"{name}: {' in '.join(before[name])}, now {' in '.join(now.get(name, ('none', 'nowhere')))}"
            for name in changed
        ]
        sys.exit("pip has replaced packages of the base image:\n" + "\n".join(rows))
    print("unchanged: " + ", ".join(f"{name} {version}" for name, (version, _) in before.items()))


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
