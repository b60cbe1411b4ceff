"""Result files: one per variant and seed, with the settings and the machine that made it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from recipes import base_mark, slug
from variants import Variant

from minitron_mp import InputError
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.workflow.graph import StageGraph

COLUMNS = ("num_tokens", "loss", "forward_kl", "ce", "step_time_s", "tokens_per_s")
"""Columns of metrics.jsonl that a result needs."""


def result_of(output: Path, name: str, seed: int) -> Path:
    return output / "results" / f"{slug(name, seed)}.json"


def made_by(path: Path, mark: str, base: str, *, plain: bool) -> bool:
    """Return whether the result exists and has these settings and this text.

    plain: it must also have the plain loop's result and the speed of both.
    """
    if not path.exists():
        return False
    result = json.loads(path.read_text())
    has_plain = "ratios" in (result["plain"] or {})
    return result["fingerprint"] == mark and result["base"] == base and (has_plain or not plain)


def refuse_to_overwrite(args: argparse.Namespace, paths: list[Path]) -> None:
    """Raise InputError if one of these results has other settings; other claims may use it."""
    different = [
        path for path in paths if path.exists() and json.loads(path.read_text())["base"] != base_mark(args)
    ]
    if different:
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        raise InputError(
            f"{different[0]}{more} come from other settings (--set, or another {args.size}.yaml); "
            "give another --output, or delete them"
        )


def outcome(project: StageGraph) -> dict[str, Any]:
    """Read the result from the artifacts of a finished run."""
    recipe, plan = project.recipe, PrunePlan.load(project.paths["plan"])
    evaluation = json.loads(project.paths["evaluate"].read_text())
    for name in ("manifest", "speed", "texts"):
        evaluation.pop(name)
    steps = logged_steps(project.paths["distill"] / "metrics.jsonl")
    curve, tokens = [], 0
    for step in steps:
        tokens += step["num_tokens"]
        curve.append([tokens, step["loss"], step["forward_kl"], step["ce"]])
    return {
        **evaluation,
        "parameters": {"teacher": plan.teacher.num_parameters(), "student": plan.student.num_parameters()},
        "layers": plan.layers,
        "tokens": tokens,
        "sequence_length": recipe.data.sequence_length,
        "seconds": sum(step["step_time_s"] for step in steps),
        "tokens_per_s": statistics.median(step["tokens_per_s"] for step in steps),
        "curve": rounded(curve),
        "config": json.loads((project.paths["export"] / "config.json").read_text()),
    }


def logged_steps(path: Path) -> list[dict[str, Any]]:
    """Read the metrics of all steps. InputError if another version wrote them, with other columns."""
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    missing = sorted({name for step in steps for name in COLUMNS if name not in step})
    if missing:
        raise InputError(
            f"{path} has no {', '.join(missing)} in some steps, because another version of the library "
            "wrote it; delete the output folder of this variant and run it again"
        )
    return steps


def environment(args: argparse.Namespace, variant: Variant) -> dict[str, Any]:
    """Return date, hardware, software and text of a result, with file names but no folders."""
    pair = args.shift_text if variant.text == "shift-text" else args.text
    text = (
        f"{pair[0].name}, held out {pair[1].name}"
        if pair
        else f"standard library of Python {platform.python_version()}, held out by package"
    )
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    software = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "size": args.size,
        "overrides": args.set,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware,
        "software": software,
        "text": text,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def rounded(value: Any) -> Any:
    """Round all floats to 6 digits, because curves have hundreds of rows."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
