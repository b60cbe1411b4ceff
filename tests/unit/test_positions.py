"""Positions of the samples of a step; changes in manifests; which checkpoints are deleted."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minitron_mp.artifacts.manifest import TIMING, Change, Manifest, Validation, writing_artifact
from minitron_mp.artifacts.run_folder import checkpoint_step, complete_checkpoints, discard_checkpoints
from minitron_mp.config.recipe import make_recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.data.batches import KEYS, microbatches
from minitron_mp.data.positions import SamplePositions, sample_positions
from minitron_mp.errors import InputError
from minitron_mp.training.run_checkpoint import RunCheckpoints, step_folder
from minitron_mp.workflow.changes import ACCEPTABLE, accept_option, accepted_names

STEPS = 30


def simulated(sizes: dict[int, int], skipped: list[range]) -> list[int]:
    """Return the first sample of each step, by reading batch after batch."""
    batch = sample = size = 0
    starts = []
    for step in range(STEPS):
        size = sizes.get(step, size)
        while any(batch in part for part in skipped):
            batch, sample = batch + 1, sample + size
        starts.append(sample)
        batch, sample = batch + 1, sample + size
    return starts


@pytest.mark.parametrize("sizes", [{0: 4}, {0: 4, 10: 8}, {0: 4, 10: 8, 11: 6, 20: 2}])
@pytest.mark.parametrize(
    "skipped", [[], [range(3, 5)], [range(1)], [range(0, 2), range(2, 3), range(10, 12), range(40, 50)]]
)
def test_positions_are_those_of_reading_batch_after_batch(sizes, skipped):
    ranges = tuple((part.start, part.stop - 1) for part in skipped)
    positions = SamplePositions(tuple(sizes.items()), ranges)
    expected = simulated(sizes, skipped)
    assert [positions.first_sample(step) for step in range(STEPS)] == expected
    last = [size for first, size in sizes.items() if first < STEPS][-1]
    assert positions.num_samples(STEPS) == expected[-1] + last
    for steps in (1, 10, 11, STEPS):
        given = [[size for first, size in sizes.items() if first <= step][-1] for step in range(steps)]
        assert positions.num_trained(steps) == sum(given)


def test_positions_of_a_run_with_changes():
    settings = TrainingConfig(steps=60, global_batch_size=16, skip_batches=[[3, 4]])
    changes = [
        Change(step=10, name="global_batch_size", old=4, new=8),
        Change(step=10, name="lr", old=1e-3, new=1e-4),
        Change(step=20, name="global_batch_size", old=8, new=16),
    ]
    positions = sample_positions(settings, changes)
    assert positions == SamplePositions(((0, 4), (10, 8), (20, 16)), ((2, 3),))
    sizes = [4] * 10 + [8] * 10 + [16] * 5
    moved = [first + (8 if step >= 2 else 0) for step, first in enumerate([0, *accumulate(sizes[:-1])])]
    assert [positions.first_sample(step) for step in range(25)] == moved


def test_microbatches_of_a_moved_step():
    """All data parallel ranks together read the samples of the step, in any split."""
    samples: Any = _Numbers()
    positions = SamplePositions(((0, 4), (3, 8)), ((1, 1),))
    for step, first in ((0, 0), (1, 8), (3, 16), (4, 24)):
        size = 4 if step < 3 else 8
        moved = positions.from_step(samples, step)
        read = [
            int(row)
            for rank in range(2)
            for batch in microbatches(
                moved, step, global_batch_size=size, micro_batch_size=1, dp_rank=rank, dp_size=2
            )
            for row in batch["tokens"][:, 0]
        ]
        assert sorted(read) == list(range(first, first + size))


class _Numbers:
    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        return {key: torch.full((2,), index) for key in KEYS}


def manifest(changes: list[Change] | None = None, **settings: Any) -> Manifest:
    return Manifest(stage="distill", settings=settings, inputs={}, changes=changes or [])


def test_accepted_change_is_recorded_with_its_step():
    saved = manifest(lr=1e-3, steps=10, teacher={"fp8": None})
    wanted = manifest(lr=1e-4, steps=20, teacher={"fp8": None}, schedule="constant")
    run = wanted.accepting(("lr", "steps", "schedule", "clip_grad"), saved, 7)
    assert run.changes == [
        Change(step=7, name="lr", old=1e-3, new=1e-4),
        Change(step=7, name="steps", old=10, new=20),
        Change(step=7, name="schedule", old=None, new="constant"),
    ]
    assert run.fingerprint == wanted.fingerprint, "the artifact is that of the last settings"
    assert run.at_step(7) == saved
    assert run.at_step(8) == run
    # Later starts need no option, and keep the history.
    assert wanted.accepting((), run, 9) == run
    again = manifest(lr=1e-5, steps=20, teacher={"fp8": None}, schedule="constant")
    twice = again.accepting(("lr",), run, 9)
    assert [change.step for change in twice.changes] == [7, 7, 7, 9]
    assert (twice.at_step(9), twice.at_step(3)) == (run, saved)
    assert again.accepting((), run, 9).at_step(9).changed_settings(run) == ["lr: 1e-05, here 0.0001"]


def test_setting_of_a_section_can_change():
    saved, wanted = manifest(correct={"lr": 1.0, "steps": 2}), manifest(correct={"lr": 2.0, "steps": 2})
    run = wanted.accepting(("correct.lr",), saved, 3)
    assert run.at_step(3) == saved


def test_checkpoints_from_before_a_change_are_deleted_at_the_end(tmp_path):
    first = manifest(lr=1.0)
    run = manifest(lr=2.0).accepting(("lr",), first, 4)
    other = manifest(lr=3.0)
    for step, saved in ((2, first), (4, first), (6, run), (8, other)):
        with writing_artifact(step_folder(tmp_path, step), saved):
            pass
    with writing_artifact(tmp_path / TIMING, first):
        pass
    discard_checkpoints(tmp_path, run)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000008"]


@pytest.mark.parametrize(
    ("present", "kept"),
    [
        ([100, 200, 300], [200, 300]),
        ([200, 250], [200, 250]),
        ([200, 250, 300], [200, 300]),
        ([200, 300, 301], [300, 301]),
        ([300, 301, 302], [300, 302]),  # retries from one place
        ([1, 2], [1, 2]),
        ([1, 2, 3], [2, 3]),
    ],
)
def test_checkpoints_of_early_stops_are_deleted_first(tmp_path, present, kept):
    """Starts that end soon after the newest checkpoint do not delete the one before them."""
    options: Any = SimpleNamespace(manifest=manifest(), extra_state=None)
    settings = TrainingConfig(steps=1000, checkpoint_interval=100)
    world: Any = None
    checkpoints = RunCheckpoints(tmp_path, options, settings, world)
    for step in present:
        step_folder(tmp_path, step).mkdir()
    checkpoints._delete_old()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        step_folder(Path(), step).name for step in kept
    ]


def test_lasting_checkpoints_stay_beside_the_newest_ones(tmp_path):
    """The best one, and those of keep_every, also if early stops and checkpoints after them go."""
    options: Any = SimpleNamespace(manifest=manifest(), extra_state=None)
    settings = TrainingConfig(steps=1000, checkpoint_interval=100, keep_every=200)
    world: Any = None
    losses = {100: 3.0, 200: 2.9, 300: 2.1, 400: 2.5, 450: 2.6, 500: 2.4, 550: 2.3}
    for step, loss in losses.items():
        saved = manifest().model_copy(update={"validation": Validation(step=step, loss=loss)})
        with writing_artifact(step_folder(tmp_path, step), saved):
            pass
    RunCheckpoints(tmp_path, options, settings, world)._delete_old()
    kept = [path.name for path in complete_checkpoints(tmp_path)]
    assert kept == [step_folder(Path(), step).name for step in (200, 300, 400, 500, 550)]


def test_checkpoints_that_were_written_to_last_stay_without_keep_every(tmp_path):
    """A later start may lack the option, during the run and after its end."""
    options: Any = SimpleNamespace(manifest=manifest(), extra_state=None)
    world: Any = None
    for step in (100, 200, 300, 400, 500):
        saved = manifest().model_copy(update={"lasts": step == 200})
        with writing_artifact(step_folder(tmp_path, step), saved):
            pass
    settings = TrainingConfig(steps=1000, checkpoint_interval=100)
    RunCheckpoints(tmp_path, options, settings, world)._delete_old()
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path)] == [200, 400, 500]
    discard_checkpoints(tmp_path, manifest())
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path)] == [200]


def test_names_of_accept():
    recipe = make_recipe({"model": "m", "output": "o"})
    assert accepted_names("lr, clip_grad", recipe) == ("lr", "clip_grad")
    assert accepted_names("correct.lr", recipe) == ("correct.lr",)
    with pytest.raises(InputError, match="--accept precision,temperature: not a setting that may change"):
        accepted_names("lr,precision,temperature", recipe)
    cached = make_recipe({"model": "m", "output": "o", "teacher": {"placement": "cached"}})
    with pytest.raises(InputError, match="cached has the signals of equal batches on disk"):
        accepted_names("global_batch_size", cached)
    assert accept_option(["lr: 1, here 2", "correct.steps: 1, here 2"]) == "--accept lr,correct.steps"
    assert accept_option(["lr: 1, here 2", "temperature: 1, here 2"]) == ""
    assert set(ACCEPTABLE) <= set(TrainingConfig.model_fields)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([[3]], "must be ranges"),
        ([[4, 3]], "must be ranges"),
        ([[0, 3]], "counted from 1"),
        ([[5, 6], [1, 2]], "must be ascending ranges"),
        ([[1, 4], [4, 6]], "without overlap"),
    ],
)
def test_ranges_of_skipped_batches_are_checked(ranges, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(skip_batches=ranges)
