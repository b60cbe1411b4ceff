"""SIGTERM and Ctrl-C: recorded while a job runs, and as an orderly exit of a stage without ranks."""

from __future__ import annotations

import os
import signal

import pytest

from minitron_mp.distributed.job import sigterm_exits
from minitron_mp.distributed.preemption import watch_for_preemption


@pytest.fixture
def not_ignored():
    """A background job of a shell starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_first_interrupt_requests_a_stop_and_the_second_one_raises(tmp_path, capfd, not_ignored):
    before = signal.getsignal(signal.SIGINT)
    with watch_for_preemption(tmp_path) as preemption:
        assert preemption.stop_request(True) == ""
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.stop_request(False) == "Ctrl-C"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "Ctrl-C: stops at the next step or stage; once more: stops at once" in capfd.readouterr().err


def test_ignored_interrupt_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watch_for_preemption(tmp_path) as preemption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not preemption.was_signalled
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_is_recorded(tmp_path):
    with watch_for_preemption(tmp_path) as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.stop_request(False) == "SIGTERM"


def test_sigterm_runs_clean_up_code(tmp_path):
    cleaned = []

    def stage() -> None:
        with sigterm_exits():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                cleaned.append(True)

    with pytest.raises(SystemExit) as end:
        stage()
    assert end.value.code == 128 + signal.SIGTERM
    assert cleaned
