"""Check of TMPDIR."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from minitron_mp.cluster.checks import CheckResult, warning

MIN_TEMPORARY_BYTES = 100 << 20
"""Free space in TMPDIR below which there is a warning."""

MAX_TEMPORARY_PATH = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""Longest TMPDIR in which Python's multiprocessing can make a socket."""


def check_temporary_folder(folder: str) -> list[CheckResult]:
    """Check that a temporary folder exists, can be written, has space and a short path.

    folder: value of TMPDIR; "$TMPDIR" if it is not set. Without a usable TMPDIR, Python uses /tmp.
    """
    if folder in ("$TMPDIR", ""):
        folder = "/tmp"
    advice = "set TMPDIR to an existing local folder, for example /tmp"
    if not Path(folder).is_dir():
        return [warning("temporary folder", f"TMPDIR {folder} is no folder; /tmp is used", advice)]
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        detail = f"TMPDIR {folder} cannot be written ({error.strerror}); /tmp is used"
        return [warning("temporary folder", detail, advice)]
    results = []
    free = shutil.disk_usage(folder).free
    if free < MIN_TEMPORARY_BYTES:
        detail = f"TMPDIR {folder} has {free >> 20} MiB free"
        results.append(warning("temporary folder", detail, "free some space, or " + advice))
    length = len(os.fsencode(folder))
    if length > MAX_TEMPORARY_PATH:
        detail = (
            f"TMPDIR has a path of {length} bytes; sockets that libraries make below it may have 107 bytes "
            "with their names"
        )
        results.append(warning("temporary folder", detail, "set TMPDIR to a shorter path, for example /tmp"))
    return results
