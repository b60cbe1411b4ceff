"""Small files: atomic writes, JSON, and fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_mp.errors import InputError

if TYPE_CHECKING:
    from pydantic import ValidationError

SAMPLED_ABOVE_BYTES = 1 << 30
"""Larger files are not hashed whole."""

SAMPLE_BYTES = 1 << 16

SAMPLE_EVERY_BYTES = 1 << 21

ASSETS = "assets"
"""Folder inside a checkpoint artifact with the side files of the Hugging Face model."""
CARD = "README.md"
"""The model card of a Hugging Face folder."""


def read_json(path: Path, stage: str) -> Any:
    """Read a small file that a stage wrote; InputError if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is missing or damaged ({error}); delete it and run `minitron-mp {stage}` again"
        ) from error


def first_problem(error: ValidationError) -> str:
    """Return the first problem of a pydantic error as one line: 'field: message'."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


def aside_path(path: Path) -> Path:
    """Path that an artifact is written to before it is renamed: in the same folder, so that the
    rename is atomic.
    """
    return hidden_sibling(path, "tmp")


def hidden_sibling(path: Path, word: str) -> Path:
    """Hidden path in the same folder: .NAME.WORD."""
    return path.with_name(f".{path.name}.{word}")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside_path(path).write_bytes(content)
    os.replace(aside_path(path), path)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    write_bytes(path, text.encode())


def fingerprint_files(paths: list[Path]) -> str:
    """Hash of names, sizes and contents.

    Of files over 1 GiB, 64 KiB of every 2 MiB are hashed: a minute for a model of 100 GB. A change
    inside such a file that keeps its size and touches none of these is not noticed.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        is_sampled = size > SAMPLED_ABOVE_BYTES
        with path.open("rb") as file:
            while part := file.read(SAMPLE_BYTES if is_sampled else SAMPLE_EVERY_BYTES):
                digest.update(part)
                if is_sampled:
                    file.seek(SAMPLE_EVERY_BYTES - SAMPLE_BYTES, os.SEEK_CUR)
    return digest.hexdigest()[:16]
