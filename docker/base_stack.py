"""For the Dockerfile: what the base image brings for the GPU stays as it is, whatever pip would like.

    python3 docker/base_stack.py write FOLDER     before pip runs: requirements.txt, constraints.txt and stack.json in FOLDER
    python3 docker/base_stack.py check FOLDER     after it: the same versions from the same places, or exit code 1

requirements.txt: the core of setup.py. constraints.txt: the base's versions of the stack, and the pins of constraints/ for all else, so
that an image is what the tests ran with wherever the base leaves a choice. Standard library only; the base's Python runs it.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

STACK = re.compile(
    r"(torch|torchvision|torchao|pytorch-triton|triton|numpy|transformer-engine.*|apex|flash-attn.*|nvidia-.*|cuda-.*)"
)
"""What is built for the base's CUDA, or against it; numpy, because extensions are compiled for its major version."""
ROOT = Path(__file__).parents[1]


def installed() -> dict[str, tuple[str, str]]:
    """Name of a distribution of the stack -> (version, folder it lies in), as this Python finds it first."""
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
            "the base image has no torch; give one that has: --build-arg BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3"
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
        sys.exit("pip has replaced what the base image brings:\n" + "\n".join(rows))
    print("untouched: " + ", ".join(f"{name} {version}" for name, (version, _) in before.items()))


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
