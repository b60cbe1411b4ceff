"""Check that the output folder is one folder for all ranks, with atomic renames."""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from minitron_mp.cluster.checks import CheckResult, failed, ok
from minitron_mp.cluster.network import RankTable

NUM_RENAMES = 30

FILE_BYTES = 1 << 14

VISIBLE_S = 20.0
"""Timeout until a rank sees a file of another rank. Network file systems may delay it by seconds."""

ADVICE = (
    "put output on a file system that all nodes share and that has POSIX renames (Lustre, GPFS, NFS "
    "without nosharecache; not an object store)"
)


def check_file_system(folder: Path, job: RankTable) -> list[CheckResult]:
    """Check that all ranks see one folder, and see either the old or the new content of a file.

    Called by all ranks. Rank 0 replaces a file many times while all ranks read it. Then it renames
    a folder, as a finished artifact is renamed, and each rank writes a file that rank 0 must see.
    All files are in a temporary folder. It is deleted, and so are parents that did not exist before.
    """
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    if job.rank == 0:
        temporary = folder / f".doctor-{uuid.uuid4().hex[:8]}"
        try:
            temporary.mkdir(parents=True)
            _replace(temporary / "file", 0)
        except OSError as error:
            job.store.set("scratch", "")
            detail = f"{folder} cannot be written: {error}"
            return [failed("file system", detail, "set another output, or make it writable for this user")]
        job.store.set("scratch", str(temporary))
    name = job.wait("scratch")
    if not name:
        return []  # rank 0 reports the reason
    scratch = Path(name)
    try:
        problems = _rename_problems(scratch, job)
        problems += _visibility_problems(scratch, job)
    finally:
        if job.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            with suppress(OSError):  # another process has written there
                for parent in created:
                    parent.rmdir()
    if problems:
        return [failed("file system", f"{folder}: {problem}", ADVICE) for problem in problems]
    shared = "one folder for all ranks, " if job.size > 1 else ""
    return [ok("file system", f"{folder}: {shared}renames are atomic")]


def _rename_problems(scratch: Path, job: RankTable) -> list[str]:
    """Return this rank's problems with a file that rank 0 replaces and a folder that it renames."""
    problems: list[str] = []
    reader = threading.Thread(target=lambda: problems.extend(_read_while_replaced(scratch / "file")))
    reader.start()
    job.store.set(f"reads/{job.rank}", "1")
    if job.rank == 0:
        job.missing_ranks("reads")
        for count in range(1, NUM_RENAMES + 1):
            _replace(scratch / "file", count)
            time.sleep(0.002)
        (scratch / "aside").mkdir()
        (scratch / "aside").rename(scratch / "in place")
        job.store.set("renamed", "1")
    reader.join()

    def is_renamed() -> bool:
        return (scratch / "in place").is_dir() and not (scratch / "aside").exists()

    if not problems and job.wait("renamed") and not _becomes_true(is_renamed, VISIBLE_S):
        problems.append(f"a renamed folder does not appear within {VISIBLE_S:.0f} s")
    return problems


def _visibility_problems(scratch: Path, job: RankTable) -> list[str]:
    """Return rank 0's problems with files of all other ranks; [] on those ranks."""
    with suppress(OSError):
        _replace(scratch / f"rank{job.rank}", NUM_RENAMES)
    job.store.set(f"left/{job.rank}", "1")
    if job.rank > 0:
        return []
    job.missing_ranks("left")

    def missing_files() -> list[int]:
        return [rank for rank in range(job.size) if not (scratch / f"rank{rank}").exists()]

    if _becomes_true(lambda: not missing_files(), VISIBLE_S if job.size > 1 else 0):
        return []
    return [f"rank 0 does not see files of ranks {', '.join(map(str, missing_files()))}"]


def _replace(path: Path, count: int) -> None:
    """Replace a file in the same way as artifacts.files.write_bytes()."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(bytes([count]) * FILE_BYTES)
    os.replace(temporary, path)


def _read_while_replaced(path: Path) -> list[str]:
    """Read the file until its last replacement; return the problems."""
    last = 0
    deadline = time.monotonic() + VISIBLE_S
    while last < NUM_RENAMES:
        if time.monotonic() > deadline:
            return [f"this rank does not see files of rank 0 within {VISIBLE_S:.0f} s"]
        time.sleep(0.001)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            if last:
                return ["a file disappears for a moment while it is replaced"]
            continue  # another node may see a new folder late
        except OSError:  # a stale NFS handle; the next attempt opens the file again
            continue
        if len(content) != FILE_BYTES or len(set(content)) > 1:
            return ["a file is half-written while it is replaced"]
        if content[0] < last:
            return ["a replaced file has its old content again"]
        last = content[0]
    return []


def _becomes_true(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Return whether a condition becomes true before the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
