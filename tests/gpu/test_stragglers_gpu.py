"""The timer of forward passes on a GPU: device time, without a synchronisation by itself.

pytest tests/gpu
"""

from __future__ import annotations

import time

import pytest
import torch

from minitron_mp.training.stragglers import ForwardTimer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_timer_measures_the_time_of_the_device():
    timer = ForwardTimer(torch.device("cuda", 0))
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        with timer:
            torch.cuda._sleep(100_000_000)  # cycles: about 50 ms
    issued_s = time.perf_counter() - start
    torch.cuda.synchronize()
    total_s = time.perf_counter() - start
    measured_s = timer.take_s()
    print(f"issued in {issued_s:.4f} s, measured {measured_s:.4f} s, wall {total_s:.4f} s")
    assert issued_s < 0.1 * total_s, "the host did not wait"
    assert measured_s == pytest.approx(total_s, rel=0.1)
    assert timer.take_s() == 0.0
