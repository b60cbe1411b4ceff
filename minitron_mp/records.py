"""What ran: a line for each stage that a command has finished, in stages.jsonl beside the artefacts, for the report.

An artefact says what it is made from, and so whether it has to be made again; a record says on what and how long, which changes nothing of it.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ValidationError

from minitron_mp import __version__, artifact

FILE = "stages.jsonl"
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "transformers", "numpy")


class Record(BaseModel):
    """fingerprint: of the artefact. seconds: by the clock, of the command that finished it. ranks: of the job, all roles. device: of a rank."""

    stage: str
    fingerprint: str
    seconds: float
    ended: str
    ranks: int
    ranks_per_node: int
    device: str
    software: dict[str, str]

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


def note(root: Path, stage: str, fingerprint: str, seconds: float, *, ranks: int, ranks_per_node: int, device: str) -> None:
    """Append a record; for one process."""
    job = {"ranks": ranks, "ranks_per_node": ranks_per_node, "device": device, "software": software()}
    record = Record(stage=stage, fingerprint=fingerprint, seconds=seconds, ended=time.strftime("%Y-%m-%d %H:%M:%S"), **job)
    with (root / FILE).open("a", encoding="utf-8") as file:
        file.write(record.model_dump_json() + "\n")


def of(root: Path, paths: Mapping[str, Path]) -> dict[str, Record]:
    """Stage -> how its artefact, as it lies there, was made. paths: stage -> artefact. Stages whose record is lost or damaged are left out."""
    made = {stage: found.fingerprint for stage, path in paths.items() if (found := artifact.find(path))}
    newest = {record.stage: record for record in _read(root / FILE) if made.get(record.stage) == record.fingerprint}
    return {stage: newest[stage] for stage in paths if stage in newest}


def _read(file: Path) -> Iterator[Record]:
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            yield Record.model_validate(json.loads(line))
        except (ValueError, ValidationError):  # a kill in the middle of a line
            continue
