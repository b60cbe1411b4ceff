"""Functions that read the numbers of a stage from its folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULT = "result.json"
"""File in which a program of this folder writes its numbers."""


def log_of(folder: Path) -> str:
    return (folder / "log").read_text(errors="replace")


def read_result(folder: Path) -> dict[str, Any]:
    """Numbers that the program wrote itself."""
    return json.loads((folder / RESULT).read_text())


def read_tests(folder: Path) -> dict[str, Any]:
    """Counts of pytest's summary, failed tests and reasons of skipped ones."""
    text = log_of(folder)
    summary = re.findall(r"^.*\b\d+ (?:passed|failed|skipped|error).* in [\d.]+s.*$", text, re.M)
    if not summary:
        raise ValueError("pytest printed no summary")
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", summary[-1])}
    kept = {name: counts.get(name, 0) for name in ("passed", "failed", "skipped")}
    kept["errors"] = counts.get("error", 0) + counts.get("errors", 0)
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", text, re.M)
    found: dict[str, Any] = {**kept, "skipped_because": sorted(set(reasons))}
    found["failures"] = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
    if not kept["passed"] and not kept["failed"] and not kept["errors"]:
        found["nothing_ran"] = "; ".join(found["skipped_because"]) or "no test"
    return found


def read_loss(folder: Path) -> dict[str, Any]:
    """Rows of benchmarks/kd_loss.py: name -> ms, share of the floor, and the error."""
    rows = {}
    for line in log_of(folder).splitlines():
        found = re.match(r"(.{28}) +([\d.]+) +(\d+)%(.*)$", line)
        if found:
            name, duration, share, rest = found.groups()
            numbers = [float(word) for word in rest.split()]
            row = {"ms": float(duration), "of_floor": int(share) / 100}
            if len(numbers) == 3:
                row |= {"beyond_gb": numbers[0], "gradients_gb": numbers[1]}
            rows[name.strip()] = row | ({"error": numbers[-1]} if numbers else {})
    if not any(name.startswith("ours") for name in rows):
        raise ValueError("the table of kd_loss.py has no row of our loss")
    return {"rows": rows, "sizes": next(line for line in log_of(folder).splitlines() if ", bf16, " in line)}


def read_step(folder: Path) -> dict[str, Any]:
    """Ceilings and rows of benchmarks/step.py."""
    content = json.loads((folder / "step.json").read_text())
    return {name: content[name] for name in ("ceilings_tflops", "rows")} | {
        "sequence_length": content["sizes"]["sequence_length"]
    }


def read_layers(folder: Path) -> dict[str, Any]:
    """The points of benchmarks/layers.py; the file itself goes to `minitron-mp estimate --times`."""
    content = json.loads((folder / "times.json").read_text())
    return {"file": str(folder / "times.json"), "points": content["points"]}


def read_planner(folder: Path) -> dict[str, Any]:
    """Rows of benchmarks/planner_check.py: measured and planned step time."""
    rows = {}
    for line in log_of(folder).splitlines():
        found = re.match(r"(.{34}) +([\d.]+) +([\d.]+) +(-?[\d.]+)%", line)
        if found:
            name, measured, planned, off = found.groups()
            rows[name.strip()] = {
                "step_ms": float(measured),
                "planned_ms": float(planned),
                "off": float(off) / 100,
            }
    if not rows:
        raise ValueError("planner_check.py printed no row")
    return {"rows": rows}


def read_project(folder: Path) -> dict[str, Any]:
    """The first and the last loss of a small project that ran in the stage's folder."""
    curves = sorted(folder.glob("*/metrics.jsonl"))
    losses = {}
    for path in curves:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        losses[path.parent.name] = [rows[0]["loss"], rows[-1]["loss"]]
    if not losses:
        raise ValueError("the project wrote no metrics.jsonl")
    return {"losses": losses}
