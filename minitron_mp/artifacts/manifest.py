"""Artefacts on disk: every stage writes one file or folder with a manifest, whole or not at all.

A manifest says what made the artefact: the stage, the settings that change its content, and the fingerprints of its inputs.
Its own fingerprint is a hash of these, so one comparison tells whether an artefact is the one that a recipe asks for.
Parallel layout, microbatch size and logging are left out of the settings on purpose: they do not change the result.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from minitron_mp.artifacts.files import _aside, aside_path, write_text
from minitron_mp.errors import InputError, differing_fields, refuse
from minitron_mp.models.arch import Arch

FORMAT = 2
"""Version of the artefacts. 2: checkpoint keys for each layer. 1: one tensor of all layers."""

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


def find_manifest(artifact: Path) -> Manifest | None:
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


def require_artifact(artifact: Path, stage: str, expected: Manifest | None = None) -> Manifest:
    """The artefact's manifest; InputError when it is missing, from another stage, or not what the recipe asks for."""
    found = find_manifest(artifact)
    if found is None:
        raise InputError(f"{artifact} is missing; run `minitron-mp {stage}` first")
    require_format(artifact, found)
    if expected is not None and found.fingerprint != expected.fingerprint:
        refuse(
            f"{artifact} was made from something else; run `minitron-mp {stage}` again, or restore what differs:",
            found.differences(expected),
        )
    return found


def require_format(artifact: Path, found: Manifest) -> None:
    """Raise InputError unless this version of the library reads the format of the artefact."""
    if found.format != FORMAT:
        raise InputError(
            f"{artifact} has format {found.format}, this version reads format {FORMAT}; "
            f"delete it and run `minitron-mp {found.stage}` again"
        )


@contextmanager
def writing_artifact(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """Yield a folder to write to; on success it takes the artefact's place, manifest included. For one process.

    A kill leaves the old artefact or the new one (find() puts the old one back if it came between the two renames).
    """
    temporary = prepare_artifact(folder)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    commit_artifact(folder, manifest)


def prepare_artifact(folder: Path) -> Path:
    """First half of writing(), for ranks that write together: rank 0 calls it, then all write below aside(folder)."""
    temporary = aside_path(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit_artifact(folder: Path, manifest: Manifest) -> None:
    """Second half of writing(): rank 0 calls it when every rank has written."""
    old = _aside(folder, "old")
    write_text(aside_path(folder) / MANIFEST, manifest.model_dump_json(indent=1))
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside_path(folder).rename(folder)
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
