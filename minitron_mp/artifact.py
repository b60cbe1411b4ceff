"""Artefacts on disk: every stage writes one file or folder with a manifest, whole or not at all.

A manifest says what made the artefact: the stage, the settings that change its content, and the fingerprints of its inputs.
Its own fingerprint is a hash of these, so one comparison tells whether an artefact is the one that a recipe asks for.
Parallel layout, microbatch size and logging are left out of the settings on purpose: they do not change the result.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from minitron_mp.arch import Arch, differing_fields
from minitron_mp.errors import InputError, refuse

FORMAT = 1
MANIFEST = "manifest.json"


class Manifest(BaseModel):
    """What made an artefact. inputs: name -> fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    arch: Arch | None = None
    format: int = FORMAT
    made_by: str = ""
    """For people; another version's artefact is as good while the format is the same."""

    @property
    def fingerprint(self) -> str:
        content = self.model_dump(mode="json", include={"stage", "settings", "inputs", "format"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: Manifest) -> list[str]:
        """'settings.x: 1, here 2' for each field on which self (found) and other (expected) differ."""
        rows = differing_fields(
            {"stage": self.stage, "format": self.format}, {"stage": other.stage, "format": other.format}
        )
        rows += [f"settings.{row}" for row in differing_fields(_flat(self.settings), _flat(other.settings))]
        return rows + [f"input {row}" for row in differing_fields(self.inputs, other.inputs)]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


def find(artifact: Path) -> Manifest | None:
    """The manifest of a whole artefact, or None when there is none; InputError for a damaged one, and for a folder of somebody else.

    It lies in manifest.json in a folder, under "manifest" in a .json file, in the metadata of a .safetensors file.
    Takes up a replacement that a kill stopped half-way.
    """
    if not artifact.exists():
        with suppress(OSError):  # there is none, or another rank was faster
            _aside(artifact, "old").rename(artifact)
    if artifact.is_dir() and not (artifact / MANIFEST).is_file():
        raise InputError(
            f"{artifact} holds no {MANIFEST}: minitron-mp did not make it and will not replace it; move it, or set another output"
        )
    try:
        if artifact.is_dir():
            text = (artifact / MANIFEST).read_text()
        elif artifact.suffix == ".json":
            text = json.dumps(json.loads(artifact.read_text())["manifest"])
        else:
            from safetensors import safe_open

            with safe_open(artifact, "numpy") as file:
                text = file.metadata()["manifest"]
        return Manifest.model_validate_json(text)
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged in one of many ways: json, safetensors, pydantic, a missing key
        raise InputError(f"{artifact} is damaged ({error}); delete it and run its stage again") from error


def require(artifact: Path, stage: str, expected: Manifest | None = None) -> Manifest:
    """The artefact's manifest; InputError when it is missing, from another stage, or not what the recipe asks for."""
    found = find(artifact)
    if found is None:
        raise InputError(f"{artifact} is missing; run `minitron-mp {stage}` first")
    if expected is not None and found.fingerprint != expected.fingerprint:
        refuse(
            f"{artifact} was made from something else; run `minitron-mp {stage}` again, or restore what differs:",
            found.differences(expected),
        )
    return found


@contextmanager
def writing(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """Yield a folder to write to; on success it takes the artefact's place, manifest included. For one process.

    A kill leaves the old artefact or the new one (find() puts the old one back if it came between the two renames).
    """
    temporary = prepare(folder)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    commit(folder, manifest)


def prepare(folder: Path) -> Path:
    """First half of writing(), for ranks that write together: rank 0 calls it, then all write below aside(folder)."""
    temporary = aside(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit(folder: Path, manifest: Manifest) -> None:
    """Second half of writing(): rank 0 calls it when every rank has written."""
    old = _aside(folder, "old")
    write_text(aside(folder) / MANIFEST, manifest.model_dump_json(indent=1))
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside(folder).rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def discard_checkpoints(folder: Path, manifest: Manifest) -> None:
    """Delete a finished run's checkpoints, and the folder when it is empty then; what another run or somebody else left stays."""
    for path in folder.glob("*step_*"):
        half = path.name.startswith(".") or not (path / MANIFEST).is_file()
        if (
            half
            or Manifest.model_validate_json((path / MANIFEST).read_text()).fingerprint == manifest.fingerprint
        ):
            shutil.rmtree(path, ignore_errors=True)
    for empty in (folder, folder.parent):
        with suppress(OSError):  # not there, or not empty
            empty.rmdir()


def read_json(path: Path, stage: str) -> Any:
    """Content of a small file that a stage made; InputError when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is missing or damaged ({error}); delete it and run `minitron-mp {stage}` again"
        ) from error


def aside(path: Path) -> Path:
    """Where an artefact is written before it takes its place: same folder, so that the rename is atomic."""
    return _aside(path, "tmp")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside(path).write_bytes(content)
    os.replace(aside(path), path)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def fingerprint_files(paths: list[Path]) -> str:
    """Hash of names, sizes and contents. Files over 1 GiB count by 64 KiB of every 2 MiB: a minute for a model of 100 GB.

    A change inside a larger file that keeps the size and touches none of these is not seen.
    """
    digest, whole, sample, step = hashlib.sha256(), 1 << 30, 1 << 16, 1 << 21
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            while part := file.read(step if size <= whole else sample):
                digest.update(part)
                if size > whole:
                    file.seek(step - sample, os.SEEK_CUR)
    return digest.hexdigest()[:16]


def _aside(artifact: Path, word: str) -> Path:
    return artifact.with_name(f".{artifact.name}.{word}")
