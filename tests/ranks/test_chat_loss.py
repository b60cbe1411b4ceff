"""The loss of chats: means over the tokens of the assistant, in every layout."""

from __future__ import annotations

import json
import math

import pytest
import reference
from cases import ARCHS, BY_NAME, DISTILL, GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH, settings
from chats import make_chat_tokenizer, make_chats, turn

from minitron_mp.config.data import DataConfig
from minitron_mp.config.distillation import HiddenStatesConfig
from minitron_mp.data.batches import Corpus, microbatches, open_samples
from minitron_mp.data.corpus import tokenize_corpus
from minitron_mp.data.tokenizer import load_tokenizer
from minitron_mp.models.axes import HIDDEN

ROUNDING = 1e-5
"""As in test_training.py."""

STEPS = 3


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Samples of three steps. One sample of the second step, and the whole third step, do not count.

    The ids are reduced to the vocabulary of the models.
    """
    root = tmp_path_factory.mktemp("chats")
    tokenizer = load_tokenizer(make_chat_tokenizer(root / "tokenizer"))
    path = root / "a.jsonl"
    chats = [[turn("user", f"a {i}"), turn("assistant", f"{i} b " * (1 + i % 9))] for i in range(80)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in [*chats, *make_chats(10)]))
    texts = {part: [str(path)] for part in ("calibration", "train", "valid")}
    data = DataConfig(**texts, chat_field="messages", sequence_length=SEQUENCE_LENGTH)
    tokenize_corpus(data, tokenizer, root / "data", 1)
    corpus = Corpus(root / "data", tokenizer, SEQUENCE_LENGTH, 1, data=data)
    opened = open_samples(corpus, "train", STEPS * GLOBAL_BATCH_SIZE, repeat=True)
    size = {"global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": GLOBAL_BATCH_SIZE}
    steps = [dict(microbatches(opened, step, **size, dp_rank=0, dp_size=1)[0]) for step in range(STEPS)]
    for step in steps:
        step |= {name: step[name] % ARCHS["qwen3"].vocab_size for name in ("tokens", "labels")}
    steps[1]["loss_mask"][1] = 0
    steps[2]["loss_mask"].zero_()
    for step in steps[:2]:
        assert 0.1 < step["loss_mask"].mean() < 0.8
    return steps


def train(results, ranks, name, samples, **more):
    layout = BY_NAME[name]
    chosen = settings(layout).model_copy(update={"steps": STEPS, **more.pop("changes", {})})
    return ranks(
        layout.ranks,
        "chat_loss_workers.train_on_samples",
        output=results.root / "chat_loss" / f"{name}{len(more)}",
        chosen=chosen,
        samples=samples,
        **results._training("qwen3", layout),
        **more,
    )


@pytest.mark.parametrize("name", [pytest.param("one", marks=pytest.mark.slow), "tp2-pp2-sp", "cp2-dp2"])
def test_loss_and_gradient_are_means_over_the_tokens_of_the_assistant(results, ranks, samples, name):
    """Float64 dense weights and AdamW. A step without such tokens has no loss, and no gradient."""
    found = train(results, ranks, name, samples)
    metrics = found[0]["metrics"]
    plan = results.plan("qwen3", "all")
    arch, weights = ARCHS["qwen3"], results.weights("qwen3")
    student = reference.sliced(arch, weights, plan)
    plain = reference.PlainTraining(arch, weights, plan.student, student, DISTILL)
    for step in range(2):
        plain.step(samples[step], metrics[step].lr)
        mine = metrics[step]
        assert mine.num_tokens == samples[step]["loss_mask"].sum()
        for value, expected in zip((mine.loss, mine.divergence, mine.ce, mine.grad_norm), plain.history[-1]):
            assert math.isclose(value, expected, rel_tol=ROUNDING), (step, value, expected)
    assert metrics[2].num_tokens == 0
    assert metrics[2].grad_norm == 0
    assert metrics[2].num_skipped is None
    assert metrics[2].values().keys() & {"loss", "ce", "forward_kl"} == set()
    assert all(rank["finite"] for rank in found)

    logits = reference.logits(plan.student, student, samples[0]["tokens"])
    teacher = reference.logits(arch, weights, samples[0]["tokens"])
    kl, ce = reference.losses(plan.student, logits, teacher, samples[0]["labels"], 1.0)
    mask = samples[0]["loss_mask"].double()
    for rank in found:
        quality = rank["quality"]
        assert quality.num_tokens == mask.sum()
        assert math.isclose(quality.loss, (ce * mask).sum() / mask.sum(), rel_tol=ROUNDING)
        assert math.isclose(quality.kl, (kl * mask).sum() / mask.sum(), rel_tol=ROUNDING)
        assert "have no token that counts in the loss; read more samples" in rank["error"]


def test_step_that_does_not_count_keeps_the_projection_finite(results, ranks, samples):
    """Of the loss on hidden states. Its gradient is divided by the tokens of the step."""
    states = HiddenStatesConfig(layers={0: 0, 3: 2})
    channels = results.plan("qwen3", "all").units(HIDDEN).tolist()
    (found,) = train(
        results,
        ranks,
        "one",
        [samples[0], samples[2], samples[1]],
        channels=channels,
        changes={"states": states},
    )
    _, second, third = found["metrics"]
    assert second.num_tokens == 0
    assert found["finite"]
    assert third.num_skipped is None
    assert all(math.isfinite(value) for value in (third.loss, third.states, third.alpha, third.grad_norm))
