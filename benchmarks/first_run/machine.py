"""Hardware, versions, date and commit, as a first run records them."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "pydantic",
    "omegaconf",
    "liger-kernel",
    "pytest",
    "minitron-mp",
)


def output_of(*words: str) -> str:
    """Return what a command prints, or "" where it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> dict[str, str | None]:
    """Package -> version, None where it is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def gpus() -> list[dict[str, str]]:
    """Name, memory, driver and power limit of each GPU, by nvidia-smi."""
    fields = ("name", "memory.total", "driver_version", "power.limit")
    text = output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    return [dict(zip(fields, map(str.strip, line.split(",")))) for line in text.splitlines()]


def facts() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = next((line for line in output_of("lscpu").splitlines() if line.startswith("Model name")), "")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "changed_files": len(output_of("git", "status", "--porcelain").splitlines()),
        "hardware": {
            "gpus": gpus(),
            "cpu": model.partition(":")[2].strip(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(memory, 1),
        },
        "versions": versions(),
    }
