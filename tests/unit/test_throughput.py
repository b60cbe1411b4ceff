"""Rates of a step and when to leave, with numbers that one can check by hand."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from cases import ARCHS

from minitron_mp.config.recipe import make_recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.distributed.launcher import job_deadline
from minitron_mp.distributed.preemption import Preemption
from minitron_mp.errors import InputError
from minitron_mp.models.flops import forward_flops, head_flops, training_flops
from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.throughput import (
    StepWork,
    Throughput,
    distillation_work,
    peak_tflops,
    training_work,
)
from minitron_mp.training.validation import Validator


def test_rates_of_a_step():
    """1000 tokens of 6e9 FLOPs on 4 ranks in 2 s are 0.75 TFLOP/s each.

    The teacher's 2e9 on two ranks are 0.5.
    """
    work = StepWork(
        tokens=1000,
        student_flops=6e9,
        student_ranks=4,
        teacher_flops=lambda step: 2e9 * (step + 1),
        teacher_ranks=2,
        peak_tflops=10.0,
    )
    assert work.rates(0, 2.0) == pytest.approx(
        {"student_tflops": 0.75, "student_mfu": 0.075, "teacher_tflops": 0.5, "teacher_mfu": 0.05}
    )
    assert work.rates(1, 2.0)["teacher_tflops"] == pytest.approx(1.0)
    assert StepWork(tokens=1000, student_flops=6e9, student_ranks=4).rates(0, 2.0) == pytest.approx(
        {"student_tflops": 0.75}
    )


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", None),
        ("NVIDIA T4", None),
    ],
)
def test_peak_flops_of_a_device(device, peak):
    assert peak_tflops(device) == peak


LENGTH = 24
FILES = {"model": "m", "output": "o", "target": {"hidden_size": 28}}
TEACHER, STUDENT = ARCHS["qwen3"], ARCHS["qwen3"].resized(hidden_size=28)


def work_of(**sections) -> StepWork:
    recipe = make_recipe({**FILES, "data": {"sequence_length": LENGTH}, **sections})
    world = SimpleNamespace(
        device=torch.device("cpu"),
        size=4,
        channel=SimpleNamespace(spans={"student": range(4), "teacher": range(4, 6)}),
    )
    return distillation_work(recipe, STUDENT, TEACHER, world, tokens=96)


def test_teacher_flops_count_on_the_ranks_that_run_it():
    student, whole, head = (
        training_flops(STUDENT, LENGTH),
        forward_flops(TEACHER, LENGTH),
        head_flops(TEACHER),
    )
    here = work_of()
    assert (here.student_flops, here.teacher_flops(0), here.student_ranks, here.teacher_ranks) == (
        student,
        whole,
        4,
        4,
    )
    for payload, moved in (("hidden", head), ("logits", 0.0), ("topk", 0.0)):
        there = work_of(teacher={"placement": "remote", "ranks": 2, "payload": payload})
        assert (there.student_flops, there.teacher_flops(0), there.teacher_ranks) == (
            student + moved,
            whole - moved,
            2,
        ), payload
    cached = work_of(teacher={"placement": "cached"})
    assert (cached.student_flops, cached.teacher_ranks) == (student + head, 0)
    learning = work_of(
        correct={
            "when": "during",
            "steps": 10,
            "warmup_steps": 1,
            "global_batch_size": 8,
            "micro_batch_size": 1,
        }
    )
    assert (learning.teacher_flops(9), learning.teacher_flops(10)) == (training_flops(TEACHER, LENGTH), whole)
    alone = training_work(
        make_recipe(FILES), STUDENT, SimpleNamespace(device=torch.device("cpu"), size=2), tokens=1
    )
    assert alone.student_ranks == 2
    assert alone.peak_tflops is None


def test_metrics_are_flat_and_omit_missing_values():
    metrics = StepMetrics(
        1,
        2.0,
        2.5,
        3.0,
        0.5,
        1e-3,
        96,
        0.5,
        192.0,
        divergence_name="js",
        measured=Throughput(eta_s=7.0, student_tflops=1.5),
    )
    assert metrics.values()["js"] == 2.5
    assert not {"divergence", "divergence_name", "kl"} & metrics.values().keys()
    without_teacher = replace(metrics, divergence=None, divergence_name="")
    assert metrics.values().keys() - without_teacher.values().keys() == {"js"}
    assert metrics.values()["eta_s"] == 7.0
    assert "measured" not in metrics.values()
    assert "teacher_wait_s" not in metrics.values()
    assert metrics.measured.console_line() == "student 1.5 TFLOP/s/GPU"


def test_deadline_leaves_time_for_steps_and_a_checkpoint(tmp_path):
    """Ten steps to the next look of 2 s at most, and 30 s for the checkpoint."""
    preemption, run = Preemption(tmp_path, deadline=time.time() + 60), tmp_path / "checkpoints"
    assert preemption.needs_checkpoint_time(run)
    preemption.step_s.extend([1.0, 2.0])
    preemption.record_checkpoint(run, 30.0)
    assert not preemption.needs_checkpoint_time(run)
    assert preemption.stop_request(True, steps=10) == ""
    assert "16 steps and a checkpoint need 62" in preemption.stop_request(True, steps=16)
    assert "10 steps and a checkpoint need 80" in preemption.stop_request(True, steps=10, checkpoints=2)
    assert "10 steps, a validation and a checkpoint need 75" in preemption.stop_request(
        True, steps=10, validation_s=25.0
    )
    assert preemption.stop_request(False, steps=99) == "", "the first rank looks at the clock"
    preemption.sigterm = True
    assert preemption.stop_request(False) == "SIGTERM"


def test_time_of_the_validations_before_the_next_stop():
    """Before the first one, a held-out batch counts as a step. The last step is validated, too."""
    settings = TrainingConfig(
        steps=25, warmup_steps=0, valid_interval=10, checkpoint_interval=10, valid_batches=3
    )
    validator = Validator(settings, lambda model: SimpleNamespace(loss=1.0, kl=None))
    assert validator.seconds_until(5, 4, step_s=2.0) == 0.0
    assert validator.seconds_until(5, 5, step_s=2.0) == 6.0
    model: Any = None
    with patch("time.perf_counter", iter([0.0, 8.0, 8.0, 12.0]).__next__):
        validator.validate(model, 10)
        validator.validate(model, 20)
    assert validator.best_text == ", lowest 1.0000 at step 10"
    assert validator.seconds_until(10, 10, step_s=2.0) == 8.0
    assert validator.seconds_until(10, 30, step_s=2.0) == 16.0
    assert validator.seconds_until(20, 4, step_s=2.0) == 0.0


def test_log_marks_a_best_step_without_checkpoint():
    """Only validated checkpoints can be the best one. The last step is the final model."""
    settings = TrainingConfig(steps=22, warmup_steps=0, valid_interval=5, checkpoint_interval=10)
    losses = iter([3.0, 2.0, 1.0])
    validator = Validator(settings, lambda model: SimpleNamespace(loss=next(losses), kl=None))
    model: Any = None
    texts = []
    for step in (10, 15, 22):
        validator.validate(model, step)
        texts.append(validator.best_text)
    assert texts == [
        ", lowest 3.0000 at step 10",
        ", lowest 2.0000 at step 15 (no checkpoint)",
        ", lowest 1.0000 at step 22",
    ]


def test_invalid_deadline_is_rejected(monkeypatch):
    monkeypatch.setenv("MINITRON_DEADLINE", "1700000000.5")
    assert job_deadline() == 1700000000.5
    monkeypatch.setenv("MINITRON_DEADLINE", "tomorrow")
    with pytest.raises(InputError, match="MINITRON_DEADLINE is 'tomorrow'; give seconds since 1970"):
        job_deadline()
    monkeypatch.delenv("MINITRON_DEADLINE")
    assert job_deadline() is None


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ({"steps": [3, 2]}, r"steps \[3, 2\] must be \[first, last\]"),
        ({"steps": [0, 2]}, r"counted from 1"),
        ({"steps": [1, 101]}, r"ends after the last step, 100"),
        ({"steps": [1, 2], "ranks": [-1]}, r"must not be negative"),
    ],
)
def test_invalid_profile_ranges_are_rejected(profile, words):
    with pytest.raises(InputError, match=words):
        make_recipe({**FILES, "distill": {"profile": profile}})
