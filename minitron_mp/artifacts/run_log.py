"""What ran: a line for each stage that a command has finished, in stages.jsonl beside the artefacts, for the report.

An artefact says what it is made from, and so whether it has to be made again; a record says on what and how long, which changes nothing of it.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from minitron_mp import __version__
from minitron_mp.artifacts.manifest import find_manifest
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe

FILE = "stages.jsonl"

PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "transformers", "numpy")


class RunRecord(BaseModel):
    """fingerprint: of the artefact. seconds: by the clock, of the command that finished it. ranks: of the job, all roles. layout: keys of
    `parallel` that were not the default. device: of a rank."""

    stage: str
    fingerprint: str
    seconds: float
    ended: str
    ranks: int
    ranks_per_node: int
    layout: dict[str, Any]
    device: str
    software: dict[str, str]

    def layout_words(self, recipe: Recipe) -> str:
        """Overrides that give the layout again, where the recipe has another one by now."""
        ran, now = ParallelConfig(**self.layout).model_dump(), recipe.parallel.model_dump()
        return "".join(
            f" parallel.{key}={json.dumps(value)}" for key, value in ran.items() if value != now[key]
        )

    @property
    def launcher(self) -> str:
        """What comes before the name of the stage on a command line."""
        if self.ranks == 1:
            return "minitron-mp"
        nodes = -(-self.ranks // self.ranks_per_node)
        several = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:PORT " if nodes > 1 else ""
        return f"torchrun {several}--nproc-per-node {min(self.ranks, self.ranks_per_node)} -m minitron_mp"


def software() -> dict[str, str]:
    """Versions of what is installed here."""
    found = {"Python": platform.python_version(), "minitron-mp": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def append_record(
    root: Path,
    stage: str,
    fingerprint: str,
    seconds: float,
    *,
    ranks: int,
    ranks_per_node: int,
    layout: dict[str, Any],
    device: str,
) -> None:
    """Append a record; for one process."""
    job = {
        "ranks": ranks,
        "ranks_per_node": ranks_per_node,
        "layout": layout,
        "device": device,
        "software": software(),
    }
    record = RunRecord(
        stage=stage, fingerprint=fingerprint, seconds=seconds, ended=time.strftime("%Y-%m-%d %H:%M:%S"), **job
    )
    with (root / FILE).open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a kill in the middle of a line, which would take this one with it
                file.write(b"\n")
        file.write(record.model_dump_json().encode() + b"\n")


def records_of(root: Path, paths: Mapping[str, Path]) -> dict[str, RunRecord]:
    """Stage -> how its artefact, as it lies there, was made. paths: stage -> artefact. Stages whose record is lost or damaged are left out."""
    made = {stage: found.fingerprint for stage, path in paths.items() if (found := find_manifest(path))}
    newest = {
        record.stage: record for record in _read(root / FILE) if made.get(record.stage) == record.fingerprint
    }
    return {stage: newest[stage] for stage in paths if stage in newest}


def _read(file: Path) -> Iterator[RunRecord]:
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        with suppress(ValidationError):  # a kill in the middle of a line
            yield RunRecord.model_validate_json(line)
