"""The files of an artifact folder: which this library wrote, and which the user added or edited.

A user evaluates, converts or publishes the exported model in its folder. Such files must not be
deleted when the artifact is made again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

EDITABLE = (".json", ".md", ".txt", ".jinja")
"""Ends of the names of text files that a user may edit."""

EDITABLE_BYTES = 1 << 16
"""Size above which no checksum is recorded, so that only names of large files are compared."""

NOT_RECORDED = ("-GPTDataset-",)
"""Parts of the names of files that Megatron adds to the artifact data: its dataset index."""

OF_SYSTEMS = (".nfs", ".DS_Store")
"""Starts of the names of files that file systems and file managers add."""


def written_files(folder: Path) -> dict[str, str]:
    """Return path relative to the folder -> checksum of an editable file, "" of another one."""
    return {name: _file_checksum(path) for name, path in _files(folder)}


def changed_files(folder: Path, recorded: Mapping[str, str]) -> list[str]:
    """Return the files in a folder that are not recorded, or not with this checksum.

    recorded: the result of written_files() when the folder was complete.
    """
    return sorted(
        name
        for name, path in _files(folder)
        if name not in recorded or (recorded[name] and recorded[name] != _file_checksum(path))
    )


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _file_checksum(path: Path) -> str:
    if path.suffix not in EDITABLE or not path.is_file() or path.stat().st_size > EDITABLE_BYTES:
        return ""
    return checksum(path.read_bytes())


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (relative path, path) of files and links in a folder and its subfolders."""
    for path in folder.rglob("*"):
        is_ignored = path.name.startswith(OF_SYSTEMS) or any(part in path.name for part in NOT_RECORDED)
        if not is_ignored and (path.is_symlink() or not path.is_dir()):
            # JSON has no bytes that are not UTF-8.
            yield os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace"), path
