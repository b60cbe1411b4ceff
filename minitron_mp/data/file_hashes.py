"""Hashes of text files that are remembered, so that a later start reads only files that changed.

A hash is remembered for a path, its size, its time of modification and its time of change. A file
that changes within the resolution of these times keeps them. So a hash is remembered only if the
file was at rest for SETTLED_NS when it was read, as git does for its index ("racy git").
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from minitron_mp.artifacts.files import hash_content, write_text
from minitron_mp.artifacts.output_lock import holds_lock
from minitron_mp.config.rounds import ROUNDS
from minitron_mp.distributed.job import num_cpus
from minitron_mp.errors import InputError

HASHES_FILE = ".text_hashes.json"
"""File in the output folder with the remembered hashes."""

SHARDS = "shards"
"""Folder in the output folder with the shards of a text that is being tokenized (shards.py)."""

SHARD_FILE = "shard.json"
"""File in the folder of a shard with the hashes of its files, among others."""

SETTLED_NS = 10_000_000_000
"""Time for which a file must be unchanged before its hash is remembered. It covers file systems with
times of 2 s, and clocks that differ by some seconds."""

SAVE_EVERY_S = 60.0
"""Interval in which new hashes are saved, so that a killed start does not lose them."""

THREADS = 16
"""Files that are read at a time. Most parallel file systems are slow for one reader."""

Status = tuple[int, int, int]
"""Size, time of modification and time of change (ns) of a file."""


@dataclass(frozen=True)
class FileHash:
    """The hash of a file, and its status before it was read."""

    path: str
    status: Status
    digest: str
    is_settled: bool = True
    """Whether a later change of the file changes its status."""

    @property
    def row(self) -> list[object]:
        """The fields for JSON."""
        return [self.path, *self.status, self.digest]


@dataclass
class FileHashes:
    """Hashes of files by their absolute path. output: folder with HASHES_FILE; None for none."""

    output: Path | None = None
    known: dict[str, FileHash] = field(default_factory=dict)
    num_read: int = 0
    """Number of files that were read because no hash was known."""

    def __post_init__(self) -> None:
        if self.output is None:
            return
        self._add_rows(_read(self.output / HASHES_FILE))
        for folder in (".", f"{ROUNDS}/*"):
            for file in self.output.glob(f"{folder}/{SHARDS}/*/*/{SHARD_FILE}"):
                content = _read(file)
                self._add_rows(content.get("files") if isinstance(content, dict) else None)

    def _add_rows(self, rows: object) -> None:
        """Add saved hashes. Damaged ones are left out."""
        for row in rows if isinstance(rows, list) else []:
            with suppress(TypeError, ValueError):
                path, size, modified, changed, digest = row
                self.known[path] = FileHash(path, (size, modified, changed), digest)

    def hashes_of(self, paths: list[Path]) -> list[FileHash]:
        """Return the hash of each file. Threads read the files whose hash is not known.

        New hashes are saved if this process holds the lock of the output folder.
        """
        last_saved = time.monotonic()
        found = []
        num_read = self.num_read
        with ThreadPoolExecutor(min(THREADS, num_cpus())) as pool:
            for result, was_read in pool.map(self._hash_of, paths):
                found.append(result)
                self.num_read += was_read
                if time.monotonic() - last_saved > SAVE_EVERY_S:
                    self._save()
                    last_saved = time.monotonic()
        if self.num_read > num_read:
            self._save()
        return found

    def _hash_of(self, path: Path) -> tuple[FileHash, bool]:
        """Return the hash of a file, and whether the file was read."""
        name = os.path.abspath(path)
        now_ns = time.time_ns()
        status = status_of(path)
        known = self.known.get(name)
        if known is not None and known.status == status:
            return known, False
        digest = hash_content(path)
        is_settled = max(status[1:]) + SETTLED_NS < now_ns
        result = FileHash(name, status, digest, is_settled)
        if is_settled and status_of(path) == status:
            self.known[name] = result
        return result, True

    def _save(self) -> None:
        if self.output is None or not holds_lock(self.output):
            return
        rows = [known.row for known in list(self.known.values())]
        write_text(self.output / HASHES_FILE, json.dumps(rows))


def status_of(path: Path) -> Status:
    """Return the status of a file. InputError if it cannot be read."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}; make it readable, or remove it"
        ) from error
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def combined_hash(hashes: list[FileHash]) -> str:
    """Return a hash of the names, sizes and contents of files."""
    digest = hashlib.sha256()
    for each in sorted(hashes, key=lambda each: each.path):
        # The bytes of a name are the same in every locale, also if they are not UTF-8.
        digest.update(os.fsencode(os.path.basename(each.path)) + f":{each.status[0]}:{each.digest};".encode())
    return digest.hexdigest()[:16]


def _read(file: Path) -> object:
    """Return the content of a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
