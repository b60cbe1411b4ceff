"""Losses without layers match a dense model for every layout; layers are chosen correctly."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import reference
import torch
from cases import ARCHS, BLOCKS, GONE, LAYOUTS, TASK_CANDIDATES, make_samples
from test_eval_tasks import dense_scores

from minitron_mp.config.pruning import DepthConfig, TargetConfig
from minitron_mp.errors import InputError
from minitron_mp.evaluation.choice_tasks import result_of, right_log_p
from minitron_mp.evaluation.task_files import TaskItem, read_task_file
from minitron_mp.models.parameters import layer_key, split_key
from minitron_mp.pruning.depth import (
    DepthTrials,
    Trial,
    close_depth_cuts,
    depth_candidates,
    droppable_layers,
    kept_layers,
)

ARCH = ARCHS["qwen3"]


def without(weights, missing):
    """(architecture, weights) of the model without these layers."""
    keep = [layer for layer in range(ARCH.num_layers) if layer not in missing]
    cut = {}
    for key, value in weights.items():
        layer, name = split_key(key)
        if layer is None:
            cut[key] = value
        elif layer in keep:
            cut[layer_key(keep.index(layer), name)] = value
    return ARCH.resized(num_layers=len(keep)), cut


def dense_loss(weights, missing):
    """Mean cross-entropy of two steps of samples by a float64 model without these layers."""
    arch, cut = without(weights, missing)
    total = torch.zeros(2, dtype=torch.float64)
    for step in range(2):
        samples = make_samples(ARCH, step, 4)
        z, mask = reference.logits(arch, cut, samples["tokens"]), samples["loss_mask"].double()
        _, ce = reference.losses(arch, z, z, samples["labels"], 1.0)
        total += torch.stack([(ce * mask).sum(), mask.sum()])
    return (total[0] / total[1]).item()


@pytest.fixture(scope="module")
def dense(results):
    weights = results.weights("qwen3")
    return {
        missing: dense_loss(weights, missing)
        for missing in [frozenset(), GONE, *BLOCKS, *(block | GONE for block in BLOCKS)]
    }


@pytest.fixture(scope="module")
def dense_options(results):
    """[(log p, all most likely)] for each option, without each set of layers."""
    items = [
        item
        for name in ("choices", "words")
        for item in read_task_file(results.task_files() / f"{name}.jsonl")
    ]
    models = [without(results.weights("qwen3"), missing) for missing in [GONE, *TASK_CANDIDATES]]
    return [dense_scores(weights, items, arch) for arch, weights in models]


layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])


@layouts
def test_losses_match_dense_models_without_the_layers(results, dense, layout):
    """On every rank; also where a greedy search has dropped a layer before."""
    for rank in results.judged(layout):
        for gone, losses in rank["losses"].items():
            assert losses == pytest.approx(
                [dense[gone], *(dense[block | gone] for block in BLOCKS)], rel=1e-5
            )  # as in test_training.py


@layouts
def test_task_scores_match_dense_models_without_the_layers(results, dense_options, layout):
    """Rows have several lengths, so the layers' arguments change. One layer is dropped before."""
    for rank in results.judged(layout):
        for found, want in zip(rank["scores without"], dense_options, strict=True):
            assert found[:, 0].tolist() == pytest.approx([log_p for log_p, _ in want], rel=1e-5)
            assert (found[:, 1] == 0).tolist() == [greedy for _, greedy in want]


@pytest.mark.parametrize(("num_layers", "length"), [(6, 1), (6, 2), (6, 4), (30, 1), (30, 8)])
def test_block_search_computes_shared_layers_once(ranks, num_layers, length):
    """The number of layer forwards of one microbatch is exact.

    It is the base run plus, for each start, the layers behind the block. If many candidates share
    layers, it is at most 0.6 of one run per candidate.
    """
    blocks = depth_candidates(DepthConfig(method="block"), num_layers, length)
    counted = ranks(1, "model_workers.count_forwards", num_layers=num_layers, candidates=blocks)[0]
    assert counted == num_layers + sum(
        num_layers - length - first for first in range(num_layers - length + 1)
    )
    if num_layers == 30:
        assert counted <= 0.6 * len(blocks) * (num_layers - length)


def given(num_layers, keep, depth, trials=None, target=None, cosine=None):
    cosine = np.arange(num_layers) if cosine is None else np.array(cosine)
    return cosine, keep, target or TargetConfig(num_layers=keep), depth, trials


def kept(*case, **options):
    return kept_layers(*given(*case, **options))


def trials_of(*dropped_and_loss, accuracies=None):
    """DepthTrials of (dropped layers, loss); accuracies: one for each, and 0.9 of the whole model."""
    shares = accuracies or [None] * len(dropped_and_loss)
    trials = [
        Trial(dropped=dropped, loss=loss, accuracy=share)
        for (dropped, loss), share in zip(dropped_and_loss, shares, strict=True)
    ]
    return DepthTrials(base=Trial(dropped=[], loss=1.0, accuracy=0.9 if accuracies else None), trials=trials)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"base": 1.0, "trials": []}, "base: Input should be"),
        ({"base": {"dropped": [], "loss": 1.0, "nats": 1.0}, "trials": []}, "base.nats: Extra inputs"),
        ({"base": {"dropped": [], "loss": 1.0}}, "trials: Field required"),
        ([], "Input should be"),
    ],
)
def test_depth_file_of_another_format(tmp_path, content, problem):
    path = tmp_path / "depth.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as raised:
        DepthTrials.load(path)
    text = str(raised.value)
    assert re.match(rf"{re.escape(str(path))} is in another format \({re.escape(problem)}", text)
    assert text.endswith("; run `minitron-mp depth --force` again")
    assert "\n" not in text


def singles_of(losses, accuracies=None):
    """One trial for each layer."""
    return trials_of(*(([i], loss) for i, loss in enumerate(losses)), accuracies=accuracies)


def rounds_of(best, second):
    """The rounds of a greedy search and the next best trial of each."""
    rounds = [
        trial.model_copy(update={"next_best": other}) for trial, other in zip(best.trials, second.trials)
    ]
    return best.model_copy(update={"trials": rounds})


def notes(*case, **options):
    return close_depth_cuts(*given(*case, **options))


def test_protected_layers_are_kept():
    cosine = [0, 5, 1, 4, 3, 0]
    assert kept(6, 4, DepthConfig(), cosine=cosine) == [1, 2, 3, 4]
    assert kept(6, 4, DepthConfig(protect_first=1), cosine=cosine) == [0, 1, 3, 4]
    assert kept(6, 4, DepthConfig(protect_first=1, protect_last=1), cosine=cosine) == [0, 1, 3, 5]
    assert depth_candidates(DepthConfig(method="drop", protect_first=1, protect_last=2), 6, 1) == [
        frozenset({i}) for i in (1, 2, 3)
    ]
    with pytest.raises(InputError, match="leave 3 of 6 layers to drop from, the target drops 4"):
        droppable_layers(DepthConfig(protect_first=1, protect_last=2), 6, 4)


def test_published_llama_block_is_a_candidate_and_is_chosen():
    """2408.11796, depth: of 32 layers the last one and the first 15 stay."""
    candidates = depth_candidates(DepthConfig(method="block"), 32, 16)
    assert len(candidates) == 17
    losses = [(sorted(block), 5.0 - (block == frozenset(range(15, 31)))) for block in candidates]
    assert kept(32, 16, DepthConfig(method="block"), trials_of(*losses)) == [*range(15), 31]
    assert kept(32, 16, DepthConfig(), target=TargetConfig(drop_layers=list(range(15, 31)))) == [
        *range(15),
        31,
    ]
    assert all(
        31 not in block for block in depth_candidates(DepthConfig(method="block", protect_last=1), 32, 16)
    )


def test_single_trials_and_greedy_rounds():
    singles = singles_of([9.0, 1.2, 1.1, 1.2, 8.0])
    assert kept(5, 3, DepthConfig(method="drop"), singles) == [0, 3, 4]  # of two alike the lower one goes
    rounds = trials_of(([2], 1.1), ([1, 2], 1.3), ([1, 2, 3], 1.9))
    assert kept(5, 3, DepthConfig(method="greedy"), rounds) == [0, 3, 4]
    assert depth_candidates(DepthConfig(method="greedy"), 5, 2, gone={2}) == [
        frozenset({2, i}) for i in (0, 1, 3, 4)
    ]


def test_accuracy_ranks_before_loss():
    losses = [1.1, 1.4, 1.3, 1.2, 1.2]
    trials = singles_of(losses, accuracies=[0.4, 0.8, 0.8, 0.5, 0.5])
    assert [trial.dropped for trial in trials.ranked()] == [[2], [1], [3], [4], [0]]
    depth = DepthConfig(method="drop", metric="task", task="items.jsonl")
    assert kept(5, 3, depth, trials) == [0, 3, 4]
    assert kept(5, 2, depth, trials) == [0, 4]
    assert kept(5, 3, DepthConfig(method="drop"), singles_of(losses)) == [1, 2, 4]


def test_close_layer_cut_is_reported():
    """Among those that may go: a protected layer's score decides nothing, and hides nothing."""
    cosine = [0, 2, 1, 2, 3, 0]
    assert notes(6, 4, DepthConfig(), cosine=cosine) == []
    (note,) = notes(6, 4, DepthConfig(protect_first=1, protect_last=1), cosine=cosine)
    assert note == "layers: the last kept and first cut score are 2 and 2, closer than rounding noise"
    assert notes(6, 5, DepthConfig(), cosine=cosine) != []  # the two of score 0
    assert notes(6, 5, DepthConfig(protect_first=1), cosine=cosine) == []
    assert (
        notes(6, 2, DepthConfig(protect_first=1, protect_last=1), cosine=cosine) == []
    )  # all that may go do
    assert (
        notes(6, 5, DepthConfig(), cosine=cosine, target=TargetConfig(drop_layers=[0]))
        == notes(6, 6, DepthConfig(), cosine=cosine)
        == []
    )


def test_trials_closer_than_rounding_are_reported():
    """Compare last dropped and first kept layer, the two best blocks, and greedy rounds."""
    near = 1.2 * (1 + 2e-6)
    singles = singles_of([9.0, 1.2, 1.1, near, 8.0])
    (note,) = notes(5, 3, DepthConfig(method="drop"), singles)
    assert (
        note == "layers: without 1 (chosen) and without 3 (next best) the losses are 1.2 and 1.2000024, "
        "closer than rounding noise"
    )
    assert [notes(5, keep, DepthConfig(method="drop"), singles) for keep in (4, 2, 1)] == [
        [],
        [],
        [],
    ]  # both stay, or both go
    blocks = trials_of(([0, 1], 9.0), ([1, 2], near), ([2, 3], 1.2))
    (note,) = notes(5, 3, DepthConfig(method="block"), blocks)
    assert "without 2, 3 (chosen) and without 1, 2 (next best)" in note
    assert (
        notes(5, 3, DepthConfig(method="block"), blocks.model_copy(update={"trials": blocks.trials[:2]}))
        == []
    )
    assert (
        notes(2, 1, DepthConfig(method="block", protect_first=1), trials_of(([1], 1.1))) == []
    )  # there was no other
    best, second = (([2], 1.2), ([1, 2], 1.3)), (([3], near), ([2, 3], 1.4))
    rounds = rounds_of(trials_of(*best), trials_of(*second))
    (note,) = notes(5, 3, DepthConfig(method="greedy"), rounds)
    assert "without 2 (chosen) and without 3 (next best)" in note
    rounds = rounds_of(trials_of(*best, accuracies=[0.75, 0.5]), trials_of(*second, accuracies=[0.5, 0.5]))
    assert notes(5, 3, DepthConfig(method="greedy", metric="task", task="items.jsonl"), rounds) == []


def test_equal_accuracies_are_close_if_losses_are_close():
    depth, near = DepthConfig(method="drop", metric="task", task="items.jsonl"), 1.2 * (1 + 2e-6)
    trials = singles_of([1.2, 1.4, near, 1.2], accuracies=[0.5, 0.8, 0.5, 0.4])
    (note,) = notes(4, 2, depth, trials)
    assert note.endswith(
        "without 0 (chosen) and without 2 (next best) the accuracy is 50.0%, "
        "and the losses are 1.2 and 1.2000024, closer than rounding noise"
    )
    assert [notes(4, keep, depth, trials) for keep in (3, 1)] == [
        [],
        [],
    ]  # of the last two the losses are alike, and not the accuracies


def test_task_returns_accuracy_and_log_p_of_correct_answers():
    items = [
        TaskItem([("a", "b"), ("a", "c")], 1),
        TaskItem([("a", "b")], None),
        TaskItem([("a", "bb"), ("a", "c")], 0),
    ]
    scores = torch.tensor([[-1.0, 0], [-0.5, 1], [-2.0, 0], [-3.0, 1], [-1.0, 0]])
    assert right_log_p(items, scores) == pytest.approx((-0.5 - 2.0 - 3.0) / 3)
    assert result_of(items, scores).accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("depth", "words"),
    [
        ({"method": "block", "metric": "task"}, "give task: FILE.jsonl"),
        ({"metric": "task", "task": "a.jsonl"}, "no effect with method cosine"),
        (
            {"method": "block", "task": "a.jsonl", "task_items": 2},
            "task, task_items: no effect with metric loss",
        ),
        (
            {"method": "drop", "metric": "task", "task": "a.jsonl", "num_samples": 3},
            "num_samples: no effect with metric task",
        ),
    ],
)
def test_depth_settings_without_effect_are_rejected(depth, words):
    with pytest.raises(ValueError, match=words):
        DepthConfig(**depth)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"num_layers": 3, "drop_layers": [1]}, "num_layers and drop_layers exclude each other"),
        ({"drop_layers": [2, 1]}, "must be ascending from 0"),
        ({"drop_layers": [1, 1]}, "must be ascending from 0"),
    ],
)
def test_invalid_layer_targets_are_rejected(target, words):
    with pytest.raises(ValueError, match=words):
        TargetConfig(**target)
