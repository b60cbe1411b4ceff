"""Full disks and temporary folders: errors that name the file, and files that are never half-written."""

from __future__ import annotations

import errno
import sys
import tempfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_mp.artifacts.files import write_text
from minitron_mp.cluster import temporary_folder
from minitron_mp.cluster.temporary_folder import check_temporary_folder
from minitron_mp.console import say
from minitron_mp.errors import InputError, os_error_text
from minitron_mp.training.metrics import MetricsLog, StepMetrics


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_small_file_keeps_its_old_content(tmp_path, monkeypatch):
    write_text(tmp_path / "plan.json", "old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device.*plan.json") as error:
        write_text(tmp_path / "plan.json", "new")
    assert "free some space or set another output; the same command resumes" in os_error_text(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == "old"


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG]
)
def test_each_error_of_a_disk_has_advice(number):
    assert "; " in os_error_text(OSError(number, "text", "file"))


def test_error_of_printing_names_the_output(monkeypatch):
    stream = SimpleNamespace(write=full, flush=full, isatty=lambda: False, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(OSError, match=r"No space left on device.*standard output"):
        say("text")


def test_metrics_on_a_full_disk(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", "distill", 0, SimpleNamespace(is_main=True))
    metrics = StepMetrics(1, 1.0, 1.0, 1.0, 1.0, 1.0, 1, 1.0, 1.0)

    def train() -> None:
        with log as write:
            log.file.close()
            log.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
            write(metrics)

    with pytest.raises(InputError, match=r"metrics.jsonl or .* cannot be written: .*No space left"):
        train()


def test_temporary_folder_without_problems(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary_folder, "MIN_TEMPORARY_BYTES", 0)
    monkeypatch.setattr(temporary_folder, "MAX_TEMPORARY_PATH", 4096)
    assert check_temporary_folder(str(tmp_path)) == []
    assert check_temporary_folder("$TMPDIR") == []


@pytest.mark.parametrize(
    ("case", "detail"),
    [
        ("missing", "is no folder; /tmp is used"),
        ("file", "is no folder; /tmp is used"),
        ("read-only", "cannot be written (No space left on device); /tmp is used"),
        ("full", "has 3 MiB free"),
        ("long", "sockets that libraries make below it may have 107 bytes"),
    ],
)
def test_doctor_warns_of_a_temporary_folder(tmp_path, monkeypatch, case, detail):
    folder = tmp_path / (case if case != "long" else "x" * 100)
    if case == "file":
        folder.touch()
    elif case != "missing":
        folder.mkdir()
    if case == "read-only":
        monkeypatch.setattr(tempfile, "TemporaryFile", full)
    if case == "full":
        disk = namedtuple("disk", "total used free")(1 << 30, 0, 3 << 20)
        monkeypatch.setattr(temporary_folder.shutil, "disk_usage", lambda path: disk)
    if case != "long":
        monkeypatch.setattr(temporary_folder, "MAX_TEMPORARY_PATH", 4096)
    if case != "full":
        monkeypatch.setattr(temporary_folder, "MIN_TEMPORARY_BYTES", 0)
    (result,) = check_temporary_folder(str(folder))
    assert (result.check, result.verdict) == ("temporary folder", "warning")
    assert detail in result.detail
    assert "TMPDIR" in result.advice
