"""The lock of an output folder: refused, released, and taken over from dead processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from minitron_mp.artifacts import output_lock
from minitron_mp.artifacts.output_lock import LOCK, STALE_S, Owner, locked, read_owner
from minitron_mp.distributed import job
from minitron_mp.distributed.job import is_alive, require_launcher, this_process
from minitron_mp.errors import InputError

HOLD = """
import sys, time
from pathlib import Path
from minitron_mp.artifacts.output_lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def hold(folder: Path) -> subprocess.Popen:
    """Start a process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


def leave_lock(folder: Path, age_s: float = 0, **changes) -> Owner:
    """Write a lock as another process would have left it."""
    process = replace(this_process(), pid=2**22 + 1, **changes)
    owner = Owner(process, "token", "2026-01-01 00:00:00")
    lock = folder / LOCK
    lock.write_text(json.dumps({"process": process.values(), "token": "token", "since": owner.since}))
    then = time.time() - age_s
    os.utime(lock, (then, then))
    return owner


def test_lock_is_released_also_after_an_error(tmp_path):
    with locked(tmp_path):
        assert read_owner(tmp_path / LOCK).process == this_process()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_second_process_is_refused_until_the_first_one_is_killed(tmp_path, capsys):
    first = hold(tmp_path)
    try:
        with pytest.raises(InputError) as error, locked(tmp_path):
            pass
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    for words in (
        f"the output folder {tmp_path} is in use",
        f"process {first.pid} on {this_process().host}",
        "since 20",
        f"kill {first.pid}",
        "set another output",
        f"delete {tmp_path / LOCK}",
    ):
        assert words in str(error.value)
    with locked(tmp_path):
        pass
    assert "that process has ended" in capsys.readouterr().out


def test_zombie_and_reused_process_id_are_dead(tmp_path):
    first = hold(tmp_path)
    owner = read_owner(tmp_path / LOCK).process
    assert is_alive(owner)
    assert not is_alive(replace(owner, start_ticks="1"))  # another process with the same id
    first.kill()
    deadline = time.monotonic() + 20
    while is_alive(owner) and time.monotonic() < deadline:  # killed, but not yet waited for
        time.sleep(0.01)
    assert not is_alive(owner)
    first.wait()


@pytest.mark.parametrize(
    ("kill_error", "alive"), [(PermissionError, True), (ProcessLookupError, False), (None, True)]
)
def test_process_that_proc_hides_is_dead_only_if_no_such_process_exists(monkeypatch, kill_error, alive):
    """With hidepid=2 the files of another user's processes cannot be read."""
    owner = this_process()

    def hidden(pid: int) -> str:
        raise FileNotFoundError(pid)

    def kill(pid: int, number: int) -> None:
        assert (pid, number) == (owner.pid, 0)
        if kill_error:
            raise kill_error

    monkeypatch.setattr(job, "_read_stat", hidden)
    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(job, "this_process", lambda: owner)
    assert is_alive(owner) is alive


def test_lock_of_another_host_is_taken_over_when_its_heartbeat_is_old(tmp_path, capsys):
    leave_lock(tmp_path, age_s=STALE_S + 5, host="node7", kernel="another")
    with locked(tmp_path):
        pass
    assert "process 4194305 on node7 was removed" in capsys.readouterr().out


def test_lock_of_another_host_is_refused_when_its_heartbeat_goes_on(tmp_path):
    owner = leave_lock(tmp_path, host="node7", kernel="another", job="Slurm job 77")

    def beat() -> None:
        for _ in range(3):
            time.sleep(0.4)
            os.utime(tmp_path / LOCK)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(beat)
        refused = pytest.raises(InputError, match=r"process 4194305 on node7 of Slurm job 77.*scancel 77")
        with refused, locked(tmp_path):
            pass
    assert read_owner(tmp_path / LOCK) == owner


@pytest.mark.parametrize("suffix", ["", ".takeover"])
def test_lock_with_a_future_time_is_stale_after_it_did_not_change(tmp_path, monkeypatch, suffix):
    """Clocks differ, or the folder was copied: the file's age never grows."""
    monkeypatch.setattr(output_lock, "STALE_S", 0.6)
    monkeypatch.setattr(output_lock, "HEARTBEAT_S", 0.4)
    leave_lock(tmp_path, age_s=0 if suffix else -86400, host="node7", kernel="another")
    if suffix:
        (tmp_path / (LOCK + suffix)).touch()
        os.utime(tmp_path / (LOCK + suffix), (time.time() + 86400, time.time() + 86400))
    start = time.monotonic()
    with locked(tmp_path):
        assert read_owner(tmp_path / LOCK).process == this_process()
    assert 0.6 < time.monotonic() - start < 20
    assert list(tmp_path.iterdir()) == []


def test_owner_with_another_clock_is_refused_when_its_heartbeat_goes_on(tmp_path, monkeypatch):
    """Its heartbeats replace a time in the future by earlier ones."""
    monkeypatch.setattr(output_lock, "HEARTBEAT_S", 0.4)
    leave_lock(tmp_path, age_s=-86400, host="node7", kernel="another")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: (time.sleep(0.5), os.utime(tmp_path / LOCK)))
        with pytest.raises(InputError, match="is in use"), locked(tmp_path):
            pass


def test_lock_of_the_same_job_before_its_restart_is_stale(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    leave_lock(tmp_path, host="node7", kernel="another")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(tmp_path):
        pass


def test_damaged_lock_is_stale_after_the_same_time(tmp_path):
    (tmp_path / LOCK).write_text("")
    os.utime(tmp_path / LOCK, (1, 1))
    with locked(tmp_path):
        assert read_owner(tmp_path / LOCK).process == this_process()


def test_one_of_many_takes_a_stale_lock(tmp_path):
    """Twenty threads try at once: each holds the lock alone, or is refused."""
    leave_lock(tmp_path)
    held = []

    def attempt(number: int) -> str:
        try:
            with locked(tmp_path):
                held.append(number)
                assert len(held) == 1
                time.sleep(0.3)
                held.remove(number)
            return "held"
        except InputError:
            return "refused"

    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(attempt, range(20)))
    assert "held" in results
    assert list(tmp_path.iterdir()) == []


def test_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(*args):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with locked(tmp_path), pytest.raises(InputError, match="is in use"), locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_owner_renews_its_lock_and_replaces_a_deleted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(output_lock, "HEARTBEAT_S", 0.05)
    with locked(tmp_path):
        os.utime(tmp_path / LOCK, (1, 1))
        deadline = time.monotonic() + 20
        while (tmp_path / LOCK).stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / LOCK).stat().st_mtime > 1
        (tmp_path / LOCK).unlink()
        while not (tmp_path / LOCK).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read_owner(tmp_path / LOCK).process == this_process()
    assert list(tmp_path.iterdir()) == []


def test_owner_whose_lock_was_taken_ends(tmp_path):
    code = HOLD.replace(
        "with locked", "import minitron_mp.artifacts.output_lock as l; l.HEARTBEAT_S = 0.05\nwith locked"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    (tmp_path / "new").mkdir()
    leave_lock(tmp_path / "new", host="node7")
    os.replace(tmp_path / "new" / LOCK, tmp_path / LOCK)
    _, error = process.communicate(timeout=60)
    assert process.returncode == output_lock.EXIT_CODE
    assert "process 4194305 on node7 has taken the lock" in error


@pytest.mark.parametrize(
    ("variables", "task"),
    [
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "task 1 of 2 of Slurm"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "task 0 of 2 of Slurm"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "4"}, "task 0 of 4 of Slurm"),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8"}, "task 3 of 8 of Open MPI"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "task 1 of 2 of MPI"),
        ({"SLURM_NTASKS": "8"}, None),  # the shell of salloc
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "RANK": "1"}, None),
        ({}, None),
    ],
)
def test_tasks_without_a_launcher_are_named(monkeypatch, variables, task):
    for _, number, sizes in job.TASKS:
        for name in (number, *sizes):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if task is None:
        require_launcher()
        return
    with pytest.raises(InputError) as error:
        require_launcher()
    assert task in str(error.value)
    assert "start torchrun once per node" in str(error.value)
