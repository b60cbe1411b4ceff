"""Worker functions for the tests on a GPU that computes nothing (tests/support/fake_gpu.py)."""

from __future__ import annotations

import engine_double  # noqa: F401  # isort: skip  (before megatron.core)

from pathlib import Path
from typing import Any
from unittest.mock import patch

import fake_gpu
import torch
from cases import SEQUENCE_LENGTH, make_samples, microbatches
from model_workers import manifest
from pool import without_group

from minitron_mp.config.distillation import DistillConfig, HiddenStatesConfig
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.pruning import ScoreConfig
from minitron_mp.distillation.layer_pairs import LayerPairs
from minitron_mp.distillation.teacher import ColocatedTeacher, with_signals
from minitron_mp.evaluation.log_likelihood import Row, next_tokens, score_rows
from minitron_mp.evaluation.quality import compare
from minitron_mp.models import build
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.pruning.ablation import losses_without, scores_without
from minitron_mp.pruning.importance import recording
from minitron_mp.training.loop import take_step
from minitron_mp.training.options import RunOptions
from minitron_mp.training.run import TrainingRun

NUM_MICROBATCHES = 2


def run_all(
    parallel: dict[str, Any], arch: Arch, student: Arch, folder: Path, *, engine: bool
) -> dict[str, Any] | None:
    """Run scoring, evaluation and a distillation step of one rank.

    Returns name -> (waits by place, launched kernels by name), or None without a compiler.
    """
    library = fake_gpu.build(folder)
    if library is None:
        return None
    found: dict[str, Any] = {}
    with without_group(), fake_gpu.fake_gpu(ParallelConfig(**parallel), library) as (world, waits):

        def end(name: str) -> None:
            found[name] = dict(waits.places), dict(fake_gpu.launched)
            waits.places.clear()
            fake_gpu.launched.clear()

        def built(arch: Arch, **options: Any) -> Any:
            with patch.object(build, "uses_engine", lambda *_: engine):
                defaults = {"precision": "bf16", "sequence_length": SEQUENCE_LENGTH, "random_weights": True}
                return build_model(arch, world, ModelOptions(**defaults | options))

        teacher_model = built(arch).freeze()
        batches = microbatches(make_samples(arch, 0, 2 * NUM_MICROBATCHES), 2, 0, 1)
        waits.places.clear()
        with recording(teacher_model, ScoreConfig()) as recorder, torch.no_grad():
            teacher_model.forward(batches)
            end("scoring")
        recorder.importance()
        end("end of scoring")

        pairs = LayerPairs(STATES, student, arch, tuple(range(student.hidden_size)))
        teacher = ColocatedTeacher(teacher_model, pairs=pairs)
        model = built(student)
        waits.places.clear()
        compare({"student": model}, teacher, [batches])
        end("evaluation")
        rows = [Row(list(range(n)), 2) for n in (5, 9, 30, 31)]
        score_rows(model, rows, micro_batch_size=2, eod=0)
        next_tokens(model, [row.tokens for row in rows], micro_batch_size=2, eod=0)
        end("log-likelihoods")
        candidates = [frozenset({1}), frozenset({2, 3})]
        losses_without(model, [batches], candidates)
        scores_without(model, rows, candidates, micro_batch_size=2, eod=0)
        end("depth")

        settings = DistillConfig(
            steps=9,
            valid_interval=0,
            warmup_steps=0,
            global_batch_size=2 * NUM_MICROBATCHES,
            micro_batch_size=2,
            log_interval=2,
            ce_weight=0.5,
            states=STATES,
        )
        run = TrainingRun(
            built(student, training=settings),
            teacher,
            settings,
            RunOptions(None, manifest("distill"), seed=3),
        )
        end("start of training")
        waits.number = 0  # ranks whose gradient is not finite
        for step, name in enumerate(("step", "step with a log")):
            take_step(run, with_signals(teacher, batches, step))
            end(name)
    return found


STATES = HiddenStatesConfig(layers=[(1, 1), (2, 3)])


def known_waits(folder: Path, expressions: list[str]) -> dict[str, int] | None:
    """Return expression -> the waits that are counted for it."""
    library = fake_gpu.build(folder)
    if library is None:
        return None
    found = {}
    with without_group(), fake_gpu.fake_gpu(ParallelConfig(), library) as (world, waits):
        x = torch.ones(4, device=world.device)
        waits.places.clear()
        for text in expressions:
            eval(text, {"torch": torch, "x": x, "device": world.device})
            found[text] = sum(waits.places.values())
            waits.places.clear()
    return found
