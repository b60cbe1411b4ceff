"""Starts and refusals of the ranks of a Slurm job, and the wait for a long action of rank 0."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from minitron_mp.distributed import sync
from minitron_mp.distributed.job import begin_start, record_refusal
from minitron_mp.errors import InputError, OtherRankError, TransientError


@pytest.fixture
def job_file(tmp_path, monkeypatch):
    path = tmp_path / "job"
    for name, value in {"MINITRON_JOB_FILE": str(path), "MINITRON_RESTARTS": "1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    return path


def test_rank_0_counts_the_starts_of_a_job(job_file, monkeypatch):
    begin_start()
    begin_start()  # the allowed restart
    with pytest.raises(SystemExit, match="restart 2 of at most 1"):
        begin_start()
    monkeypatch.setenv("RANK", "1")
    begin_start()
    assert len(list(job_file.parent.glob("job.start-*"))) == 2  # without the refused start


def of_a_full_disk() -> InputError:
    error = InputError("no space")
    error.__cause__ = OSError(28, "No space left on device")
    return error


@pytest.mark.parametrize(
    ("error", "is_recorded"),
    [
        (InputError("wrong"), True),
        (SystemExit(2), True),
        (SystemExit(1), False),
        (OtherRankError("another rank failed"), False),
        (of_a_full_disk(), False),
        (TransientError("a checkpoint could not be written"), False),
        (OSError(5, "Input/output error"), False),
        (RuntimeError("a lost connection"), False),
    ],
)
def test_only_an_error_of_the_input_ends_the_restarts(job_file, error, is_recorded):
    record_refusal(error)
    assert job_file.with_name("job.refused").exists() == is_recorded
    if is_recorded:
        with pytest.raises(SystemExit) as ended:
            begin_start()
        assert ended.value.code == 2
    else:
        begin_start()


def test_wait_ends_if_rank_0_is_silent_for_the_timeout(monkeypatch):
    monkeypatch.setattr(sync, "HEARTBEAT_S", 0.2)
    start = time.monotonic()
    with pytest.raises(OtherRankError, match="rank 0 or its store has not responded for"):
        sync._Wait(dist.HashStore()).join(0.2)
    assert time.monotonic() - start < 2


def test_wait_lasts_as_long_as_rank_0_works(monkeypatch):
    monkeypatch.setattr(sync, "HEARTBEAT_S", 0.1)
    store = dist.HashStore()

    def work() -> None:
        for _ in range(20):
            time.sleep(0.1)
            store.add(sync.HEARTBEAT, 1)
        store.set(sync.DONE, "")

    thread = threading.Thread(target=work)
    thread.start()
    start = time.monotonic()
    sync._Wait(store).join(0.8)
    assert time.monotonic() - start > 1.5
    thread.join()
