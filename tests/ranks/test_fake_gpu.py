"""The real code on a GPU that computes nothing: device and dtype errors, launches and host waits.

tests/support/fake_gpu.py describes what it finds and what it does not.
"""

from __future__ import annotations

import pytest
from cases import ARCHS
from pool import Pool

TEACHER = ARCHS["qwen2"].resized(num_layers=4)
STUDENT = TEACHER.resized(hidden_size=24, num_layers=3)


def run(function: str, **kwargs: object) -> dict:
    """Run a worker in a new process; skip without a compiler."""
    pool = Pool(1, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    try:
        (found,) = pool.run(f"fake_gpu_workers.{function}", **kwargs)
    finally:
        pool.close()
    if found is None:
        pytest.skip("needs g++")
    return found


def test_known_waits_are_counted(tmp_path):
    from fake_gpu_workers import KNOWN

    assert run("known_waits", folder=tmp_path) == KNOWN


def test_x(tmp_path):
    found = run("run_all", parallel={}, arch=TEACHER, student=STUDENT, folder=tmp_path, engine=True)
    for name, (waits, kernels) in found.items():
        print(name)
        for place, count in waits.items():
            print("     ", count, place)
        print("     ", kernels)
