"""The run log for the report: stages.jsonl has one line per finished stage.

A manifest records the origin of an artifact, which decides whether it must be made again. A record
has the hardware, software and duration, which do not change the artifact.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ValidationError

from minitron_mp import __version__
from minitron_mp.artifacts.files import RUN_LOG
from minitron_mp.artifacts.manifest import find_manifest
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.rounds import split_command

PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "transformers", "numpy")


@dataclass(frozen=True)
class JobInfo:
    """The job that ran a stage.

    ranks: number of ranks of all roles. layout: the keys of `parallel` that differ from their
    defaults. device: name of the device of a rank.
    """

    ranks: int = 1
    ranks_per_node: int = 1
    layout: dict[str, object] = field(default_factory=dict)
    device: str = ""


class RunRecord(BaseModel):
    """Record of how an artifact was made: the fields of JobInfo, and the stage that ran."""

    stage: str
    fingerprint: str
    """Fingerprint of the artifact."""
    seconds: float
    """Wall time of the command that finished the stage."""
    ended: str
    """Local time at the end of the stage."""
    ranks: int
    ranks_per_node: int
    layout: dict[str, object]
    device: str
    software: dict[str, str]
    """Package -> version."""

    def layout_overrides(self, recipe: Recipe) -> str:
        """Return command line overrides that restore this layout, "" if the recipe has it."""
        recorded, current = ParallelConfig(**self.layout).model_dump(), recipe.parallel.model_dump()
        words = [
            f"parallel.{key}={json.dumps(value, separators=(',', ':'))}"
            for key, value in recorded.items()
            if value != current[key]
        ]
        return "".join(f" {shlex.quote(word)}" for word in words)

    @property
    def launcher(self) -> str:
        """The part of the command line before the name of the stage."""
        if self.ranks == 1:
            return "minitron-mp"
        nodes = -(-self.ranks // self.ranks_per_node)
        rendezvous = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:PORT " if nodes > 1 else ""
        return f"torchrun {rendezvous}--nproc-per-node {min(self.ranks, self.ranks_per_node)} -m minitron_mp"


def software() -> dict[str, str]:
    """Return the versions of Python, this package and the installed packages of PACKAGES."""
    versions = {"Python": platform.python_version(), "minitron-mp": __version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def append_record(root: Path, stage: str, fingerprint: str, seconds: float, job: JobInfo) -> None:
    """Append the record of a finished stage. Only one process may call it."""
    record = RunRecord(
        stage=stage,
        fingerprint=fingerprint,
        seconds=seconds,
        ended=time.strftime("%Y-%m-%d %H:%M:%S"),
        ranks=job.ranks,
        ranks_per_node=job.ranks_per_node,
        layout=job.layout,
        device=job.device,
        software=software(),
    )
    with (root / RUN_LOG).open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a kill interrupted the last line, so begin a new line
                file.write(b"\n")
        file.write(record.model_dump_json().encode() + b"\n")


def records_of(root: Path, paths: Mapping[str, Path]) -> dict[str, RunRecord]:
    """Return stage -> record of the artifact that exists now.

    Stages without a readable record are left out. paths: stage, or the command of an earlier round
    -> artifact.
    """
    manifests = {stage: find_manifest(path) for stage, path in paths.items()}
    fingerprints = {stage: manifest.fingerprint for stage, manifest in manifests.items() if manifest}
    newest = {(record.stage, record.fingerprint): record for record in _read(root / RUN_LOG)}
    keys = {name: (split_command(name)[0], fingerprint) for name, fingerprint in fingerprints.items()}
    return {name: newest[keys[name]] for name in paths if keys.get(name) in newest}


def _read(file: Path) -> Iterator[RunRecord]:
    lines = file.read_bytes().splitlines() if file.is_file() else []
    for line in lines:
        with suppress(ValidationError):  # a kill may have interrupted the line
            yield RunRecord.model_validate_json(line)
