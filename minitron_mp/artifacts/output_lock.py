"""Lock of an output folder: one job at a time works in it.

The lock is a file that names its owner. It does not use flock(), which some network file systems
ignore or keep per host. A hard link creates it, because that is atomic on NFS, Lustre and GPFS. The
owner renews the file's time while it lives. A lock is stale if its owner is dead: on the same host
by process id and start time, elsewhere if its time is old, or has not changed for as long while
this process watched it. Its time may lie in the future, if clocks differ or the folder was copied.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from minitron_mp.console import say
from minitron_mp.distributed.job import ProcessIdentity, is_alive, this_process
from minitron_mp.errors import InputError

LOCK = ".minitron_mp.lock"
"""Name of the lock in the output folder."""

HEARTBEAT_S = 15.0
"""Interval in which the owner renews the time of its lock."""

STALE_S = 180.0
"""Age after which the lock of an owner on another host is stale: 12 heartbeats."""

EXIT_CODE = 3
"""Exit code of a process whose lock another process has taken."""


@dataclass(frozen=True)
class Owner:
    """The owner of a lock. token: unique text of this lock. since: local time of its creation."""

    process: ProcessIdentity
    token: str
    since: str


def holds_lock(folder: Path) -> bool:
    """Return whether this process holds the lock of a folder."""
    owner = read_owner(folder / LOCK)
    return owner is not None and owner.process == this_process()


@contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Hold the lock of an existing folder in this context; for one process of a job.

    name: file name of the lock, for a folder with several locks. InputError while another job holds
    it. It waits until a lock that a dead process on another host may have left is old enough.
    """
    lock = folder / name
    owner = Owner(this_process(), uuid.uuid4().hex, time.strftime("%Y-%m-%d %H:%M:%S"))
    _acquire(lock, owner)
    stop = threading.Event()
    thread = threading.Thread(target=_heartbeat, args=(lock, owner, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        current = read_owner(lock)
        if current is not None and current.token == owner.token:
            lock.unlink(missing_ok=True)


def read_owner(lock: Path) -> Owner | None:
    """Return the owner of a lock; None if there is no lock, or its file is damaged."""
    try:
        content = json.loads(lock.read_text(encoding="utf-8"))
        return Owner(ProcessIdentity(**content["process"]), content["token"], content["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _acquire(lock: Path, owner: Owner) -> None:
    """Create the lock, or raise InputError if its owner lives."""
    waited = False
    watched, guard = _Watch(), _Watch()
    while not _create(lock, owner):
        current, age_s, renewed_at = read_owner(lock), _age_s(lock), lock_time(lock)
        if age_s is None or not renewed_at:
            continue  # it was released in the meantime
        alive = None if current is None else is_alive(current.process)
        is_renewed = watched.see("" if current is None else current.token, renewed_at)
        if alive or (alive is None and is_renewed):
            raise InputError(_refusal(lock, current))
        if alive is False or max(age_s, watched.unchanged_s) > STALE_S:
            if _remove_stale(lock, current, guard):
                say(f"{lock}: the lock of {_name(current)} was removed, because that process has ended")
                watched = _Watch()
            continue
        if not waited:
            say(
                f"{lock}: {_name(current)} holds this folder, last heartbeat {age_s:.0f} s ago; waiting for "
                f"the next one, up to {STALE_S - age_s:.0f} s"
            )
            waited = True
        time.sleep(min(1.0, HEARTBEAT_S / 4))


class _Watch:
    """Changes of a file that this process has seen, and the time since then by its own clock."""

    def __init__(self) -> None:
        self._first: tuple[str, float] | None = None
        self._last: tuple[str, float] | None = None
        self._since = time.monotonic()

    def see(self, token: str, file_time: float) -> bool:
        """Record a look at the file. Return whether its time has changed since its token was new."""
        seen = (token, file_time)
        if self._first is None or self._first[0] != token:
            self._first = seen
        if seen != self._last:
            self._last, self._since = seen, time.monotonic()
        return seen != self._first

    @property
    def unchanged_s(self) -> float:
        """Seconds since the last change."""
        return time.monotonic() - self._since


def _refusal(lock: Path, owner: Owner | None) -> str:
    since = f" since {owner.since}" if owner else ""
    stop = ""
    if owner and owner.process.job:
        stop = f"cancel it (scancel {owner.process.job.split()[-1]})"
    elif owner:
        stop = f"stop it (kill {owner.process.pid} on {owner.process.host})"
    folder = f"the output folder {lock.parent}"
    if lock.name != LOCK:
        folder = f"{lock.with_name(lock.stem.removeprefix('.'))}"
    return (
        f"{folder} is in use: {_name(owner)} has been running in it{since}; wait "
        f"for its end, {stop or 'stop it'}, or set another output. If no such process exists, delete {lock}"
    )


def _name(owner: Owner | None) -> str:
    return "another process" if owner is None else str(owner.process)


def _create(lock: Path, owner: Owner) -> bool:
    """Create the lock atomically. Return False if it exists."""
    temporary = lock.with_name(f"{lock.name}.{owner.token}")
    content = {"process": owner.process.values(), "token": owner.token, "since": owner.since}
    try:
        temporary.write_text(json.dumps(content), encoding="utf-8")
        try:
            os.link(temporary, lock)
        except FileExistsError:
            # NFS may repeat a request whose answer was lost. The count of links shows the truth.
            return temporary.stat().st_nlink == 2
        except OSError:  # a file system without hard links
            return _create_exclusively(lock, json.dumps(content))
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _create_exclusively(lock: Path, content: str) -> bool:
    try:
        with lock.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _remove_stale(lock: Path, stale: Owner | None, watched: _Watch) -> bool:
    """Remove a stale lock. Keep a lock that another process has created in the meantime.

    Only the process that creates the second file, the guard, may remove the lock. Return whether this
    process did. watched: how long the guard of another process has been seen.
    """
    guard = lock.with_name(f"{lock.name}.takeover")
    try:
        guard.touch(exist_ok=False)
    except FileExistsError:
        age_s = _age_s(guard)
        watched.see("", lock_time(guard))
        # A takeover lasts milliseconds; an older one was killed.
        if age_s is not None and max(age_s, watched.unchanged_s) > STALE_S:
            guard.unlink(missing_ok=True)
        time.sleep(0.05)
        return False
    try:
        if read_owner(lock) != stale:
            return False
        lock.unlink(missing_ok=True)
        return True
    finally:
        guard.unlink(missing_ok=True)


def lock_time(lock: Path) -> float:
    """Return the time at which a lock was last renewed, 0 without a lock."""
    try:
        return lock.stat().st_mtime
    except OSError:
        return 0.0


def _age_s(lock: Path) -> float | None:
    """Return the age of a file in seconds by the clock of its file system; None if it is missing."""
    probe = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - lock.stat().st_mtime)
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)


def _heartbeat(lock: Path, owner: Owner, stop: threading.Event) -> None:
    """Renew the lock until stop is set. End the process if another process has taken the lock.

    That happens when this process was suspended for longer than STALE_S.
    """
    while not stop.wait(HEARTBEAT_S):
        try:
            current = read_owner(lock)
            if current is not None and current.token == owner.token:
                os.utime(lock)
                continue
            if _create(lock, owner):  # someone has deleted it
                continue
            current = read_owner(lock)
        except OSError:  # the file system does not answer for a while
            continue
        if current is not None and current.token != owner.token and not stop.is_set():
            with suppress(OSError):
                sys.stderr.write(
                    f"error: {_name(current)} has taken the lock {lock} of this process, which was "
                    "suspended or could not write for a long time; this process ends, so that two jobs do "
                    "not write into one folder\n"
                )
                sys.stderr.flush()
            os._exit(EXIT_CODE)
