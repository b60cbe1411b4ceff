"""Artifacts on disk: every stage writes one file or folder with a manifest, whole or not at all.

A manifest says what made the artifact: the stage, the settings that change its content, and the fingerprints of its inputs.
Its own fingerprint is a hash of these, so one comparison tells whether an artifact is the one that a recipe asks for.
Parallel layout, microbatch size and logging are left out of the settings on purpose: they do not change the result.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from minitron_mp.errors import InputError


def read_json(path: Path, stage: str) -> Any:
    """Content of a small file that a stage made; InputError when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is missing or damaged ({error}); delete it and run `minitron-mp {stage}` again"
        ) from error


def aside_path(path: Path) -> Path:
    """Where an artifact is written before it takes its place: same folder, so that the rename is atomic."""
    return _aside(path, "tmp")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside_path(path).write_bytes(content)
    os.replace(aside_path(path), path)


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
