"""The thread that reads the next batches: order, errors, and its end."""

import threading

import pytest

from minitron_mp.data.prefetch import Prefetch
from minitron_mp.errors import InputError


class Recorder:
    """A function of a number that records its calls, and fails for one number."""

    def __init__(self, failing: int = -1):
        self.failing = failing
        self.calls: list[int] = []
        self.threads: set[str] = set()
        self.made = {number: threading.Event() for number in range(100)}

    def __call__(self, number: int) -> int:
        self.calls.append(number)
        self.threads.add(threading.current_thread().name)
        self.made[number].set()
        if number == self.failing:
            raise InputError(f"the text of step {number} cannot be read; check the disk")
        return 10 * number


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_next_numbers_are_computed_ahead_once():
    make = Recorder()
    with Prefetch(make, 6) as prefetched:
        for number in range(2, 6):
            assert prefetched(number) == 10 * number
            if number < 5:  # the next one does not wait for its use
                assert make.made[number + 1].wait(60)
    assert make.calls == [2, 3, 4, 5]  # none from the end on
    assert make.threads == {"prefetch_0"}


def test_stride_and_depth_of_a_teacher_replica():
    make = Recorder()
    with Prefetch(make, 20, stride=3, depth=2) as prefetched:
        assert prefetched(1) == 10
        assert make.made[7].wait(60)
        assert make.calls == [1, 4, 7]


def test_numbers_in_another_order_have_the_same_results():
    with Prefetch(Recorder(), 100) as prefetched:
        assert [prefetched(number) for number in (5, 6, 40, 41, 3, 3)] == [50, 60, 400, 410, 30, 30]


def test_error_is_raised_at_its_own_number():
    make = Recorder(failing=3)
    with Prefetch(make, 10) as prefetched:
        assert prefetched(2) == 20
        assert make.made[3].wait(60)
        assert prefetched(2) == 20
        with pytest.raises(InputError, match="the text of step 3 cannot be read; check the disk"):
            prefetched(3)
    assert not prefetch_threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, InputError])
def test_thread_ends_with_its_context(error):
    def train() -> None:
        with Prefetch(Recorder(), 100, depth=50) as prefetched:
            prefetched(0)
            assert prefetch_threads()
            raise error

    with pytest.raises(error):
        train()
    assert not prefetch_threads()
