"""The real code on a GPU that computes nothing: device and dtype errors, launches and host waits.

tests/support/fake_gpu.py describes what it finds and what it does not.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cases import ARCHS
from pool import Pool

TEACHER = ARCHS["qwen2"].resized(num_layers=4)
STUDENT = TEACHER.resized(hidden_size=24, num_layers=3)
LAYOUTS = {"one": {}, "tp2-sp": {"tp": 2, "sequence_parallel": True}, "cp2": {"cp": 2}}

KNOWN = {
    "x.sum().item()": 1,
    "x.tolist()": 1,
    "bool(x.sum())": 1,
    "x.cpu()": 1,
    "x.to('cpu', non_blocking=True)": 1,
    "x.nonzero()": 1,
    "x.new_tensor(3.0)": 1,
    "torch.tensor(3.0, device=device)": 1,
    "torch.ones(3).to(device)": 1,
    "torch.ones(3).to(device, non_blocking=True)": 1,
    "torch.ones(3).pin_memory().to(device)": 1,
    "torch.cuda.synchronize()": 1,
    "torch.ones(3).pin_memory().to(device, non_blocking=True)": 0,
    "torch.full((), 3.0, device=device)": 0,
    "x * 3.0 + x.sum()": 0,
    "torch.where(x > 0, x, 0.0)": 0,
}
"""Expression -> number of times that the host waits for a GPU."""

READ = "a number is read"
ALLOWED = {
    "scoring": {},
    "evaluation": {
        # at the end, the sums of each model
        "minitron_mp/evaluation/quality.py _quality: values are read": 2,
    },
    "log-likelihoods": {
        # at the end, once for the scores and once for the next tokens
        "minitron_mp/evaluation/log_likelihood.py _sum_rows: copy to the host": 2,
    },
    "depth": {
        # at the end, the losses of all candidates
        f"minitron_mp/pruning/ablation.py losses_without: {READ}": 1,
        "minitron_mp/pruning/ablation.py losses_without: values are read": 1,
        "minitron_mp/pruning/ablation.py scores_without: copy to the host": 1,
    },
    "step": {
        # Megatron's finalize_model_grads: whether the step has a token that counts
        f"minitron_mp/distributed/schedule.py run_schedule: {READ}": 1,
        # the norm decides whether gradients are applied, and is a host number in Megatron's clipping
        f"minitron_mp/training/optimizer.py gradient_norm: {READ}": 1,
        # whether the losses are finite on all ranks; issued before the norm, so it is no second wait
        f"minitron_mp/training/run.py update: {READ}": 1,
    },
}
ALLOWED["step with a log"] = ALLOWED["step"] | {
    "minitron_mp/training/step_log.py stop_clock: synchronize": 1,
    "minitron_mp/training/step_log.py _reduce: copy to the GPU from pageable memory": 1,
    "minitron_mp/training/step_log.py _reduce: values are read": 1,
    f"minitron_mp/training/step_log.py _metrics: {READ}": 2,  # alpha of each step
}
"""Part of the work -> places where the host waits for the GPU, and how often, at most."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator:
    """run("function", **kwargs) runs a worker in one process; it skips the test without a compiler."""
    pool, folder = Pool(1, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}), tmp_path_factory.mktemp("fake_gpu")

    def call(function: str, **kwargs: object) -> dict:
        (found,) = pool.run(f"fake_gpu_workers.{function}", folder=folder, **kwargs)
        if found is None:
            pytest.skip("needs g++")
        return found

    yield call
    pool.close()


def test_known_waits_are_counted(run):
    assert run("known_waits", expressions=list(KNOWN)) == KNOWN


@pytest.mark.parametrize(
    ("layout", "engine"),
    [
        ("tp2-sp", True),
        pytest.param("one", False, marks=pytest.mark.slow),
        pytest.param("one", True, marks=pytest.mark.slow),
        pytest.param("cp2", True, marks=pytest.mark.slow),
    ],
    ids=["tp2-sp-engine", "one-local", "one-engine", "cp2-engine"],
)
def test_every_operation_has_the_right_device_and_the_host_does_not_wait(run, layout, engine):
    """No error in the emulation, no wait in a scoring microbatch, and the known ones elsewhere."""
    found = run("run_all", parallel=LAYOUTS[layout], arch=TEACHER, student=STUDENT, engine=engine)
    for name, allowed in ALLOWED.items():
        places, _ = found[name]
        more = {place: count for place, count in places.items() if count > allowed.get(place, 0)}
        assert not more, f"{name}: the host waits here as well: {more}"
    launched = {name: kernels for name, (_, kernels) in found.items()}
    assert launched["scoring"] == {"_cosine_distance": 2 * TEACHER.num_layers}  # two microbatches
    assert set(launched["step"]) >= {"_statistics", "_gradient"}
