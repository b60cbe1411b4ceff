"""Small files: atomic writes, JSON, and fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_mp.errors import InputError

if TYPE_CHECKING:
    from pydantic import ValidationError

SAMPLED_ABOVE_BYTES = 1 << 30
"""Size above which only samples of a file are hashed."""

SAMPLE_BYTES = 1 << 16
"""Size of a sample."""

SAMPLE_EVERY_BYTES = 1 << 21
"""Distance between the starts of two samples."""

RUN_LOG = "stages.jsonl"
"""The run log in the output folder (run_log.py)."""
ASSETS = "assets"
"""Folder inside a checkpoint artifact with the side files of the Hugging Face model."""
CARD = "README.md"
"""The model card of a Hugging Face folder."""


def read_json(path: Path, stage: str) -> Any:
    """Return the content of a JSON file that a stage wrote. InputError if missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
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
    """Return the temporary path of an artifact, in the same folder for an atomic rename."""
    return hidden_sibling(path, "tmp")


def hidden_sibling(path: Path, word: str) -> Path:
    """Return the hidden path .NAME.WORD in the same folder."""
    return path.with_name(f".{path.name}.{word}")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file atomically. After an error, such as a full disk, the old file is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = aside_path(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a failed write does not name its file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def fingerprint_files(paths: list[Path]) -> str:
    """Return a hash of names, sizes and contents.

    For files over 1 GiB only 64 KiB of every 2 MiB are hashed, which takes a minute for a model of
    100 GB. A change outside these samples that keeps the size does not change the hash.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        # The bytes of a name are the same in every locale, also if they are not UTF-8.
        digest.update(os.fsencode(path.name) + f":{size};".encode())
        for part in _hashed_parts(path, size):
            digest.update(part)
    return digest.hexdigest()[:16]


def hash_content(path: Path) -> str:
    """Return a hash of the content of a file, of samples if it is over 1 GiB."""
    digest = hashlib.sha256()
    for part in _hashed_parts(path, path.stat().st_size):
        digest.update(part)
    return digest.hexdigest()[:32]


def _hashed_parts(path: Path, size: int) -> Iterator[bytes]:
    """Yield the content of a file, or 64 KiB of every 2 MiB of a file over 1 GiB."""
    is_sampled = size > SAMPLED_ABOVE_BYTES
    with path.open("rb") as file:
        while part := file.read(SAMPLE_BYTES if is_sampled else SAMPLE_EVERY_BYTES):
            yield part
            if is_sampled:
                file.seek(SAMPLE_EVERY_BYTES - SAMPLE_BYTES, os.SEEK_CUR)
