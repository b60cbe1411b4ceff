"""A tiny project on the ranks of a torchrun job, or on one rank.

    python benchmarks/first_run/project.py FOLDER bf16
    torchrun --nproc-per-node 2 benchmarks/first_run/project.py FOLDER remote teacher.ranks=1

It writes a random model and text, then runs `minitron-mp compress`. KIND is a name of KINDS; more
words are overrides of the recipe. Two ranks on one GPU have an NCCL_HOSTID each, because NCCL
refuses two ranks of one host on one device.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp8": {"precision": "bf16", "teacher": {"fp8": "tensorwise"}, "distill": {"fp8": "tensorwise"}},
    "remote": {"precision": "bf16", "teacher": {"placement": "remote", "window": 2}},
}
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 16,
}
"""Of a model that tp 8 divides, with sizes that FP8 allows."""
TARGET = {"num_layers": 3, "hidden_size": 192, "ffn_hidden_size": 384, "num_attention_heads": 8}
STEPS = 12
READY = "ready"
WAIT_S = 120


def make_inputs(folder: Path, kind: str) -> None:
    """Write model, text and recipe."""
    from tiny import make_model, make_recipe_file, make_text

    make_model(folder / "model", **SIZES)
    make_text(folder / "text")
    sections: dict[str, Any] = {"target": TARGET, **KINDS[kind]}
    sections["distill"] = {"steps": STEPS, **sections.get("distill", {})}
    recipe = folder / "recipe.yaml"
    make_recipe_file(recipe, folder / "model", folder / "text", folder / kind, **sections)
    (folder / READY).touch()


def wait_for_inputs(folder: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not (folder / READY).exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def separate_hosts() -> None:
    """Let NCCL accept several ranks on one GPU: each reports a different host."""
    import torch

    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks_here:
        os.environ["NCCL_HOSTID"] = f"rank{os.environ['RANK']}"


def main(folder: Path, kind: str, overrides: list[str]) -> None:
    if int(os.environ.get("RANK", "0")):
        wait_for_inputs(folder)
    else:
        make_inputs(folder, kind)
    separate_hosts()
    from minitron_mp.cli import main as command_line

    sys.argv = ["minitron-mp", "compress", str(folder / "recipe.yaml"), *overrides]
    command_line()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
