"""Choice tasks on the sharded model match a dense model; task files are validated."""

from __future__ import annotations

import json
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import ARCHS, CHOICES, LAYOUTS, SEQUENCE_LENGTH, WORDS

from minitron_mp.data.tokenizer import Tokenizer
from minitron_mp.errors import InputError
from minitron_mp.evaluation.choice_tasks import rows_of
from minitron_mp.evaluation.task_files import read_task_file

ARCH = ARCHS["qwen3"]


def encode(texts):
    """A token for each character, as the workers have it."""
    return [[ord(c) % (ARCH.vocab_size - 1) + 1 for c in text] for text in texts]


def dense_scores(weights, items, arch=ARCH):
    """[(log p, all most likely)] for each option, one at a time."""
    found = []
    for item in items:
        for context, ending in item.options:
            (tokens,), (before,) = encode([f"{context} {ending}"]), encode([context])
            start, cut = len(before), max(0, len(tokens) - SEQUENCE_LENGTH - 1)
            tokens, start = torch.tensor(tokens[cut:]), max(1, start - cut)
            z = reference.logits(arch, weights, tokens[None, :-1])[0, start - 1 :, : arch.vocab_size]
            log_p = F.log_softmax(z, -1).gather(-1, tokens[start:, None])
            found.append((log_p.sum().item(), bool((z.argmax(-1) == tokens[start:]).all())))
    return found


@pytest.fixture(scope="module")
def files(results):
    return results.task_files()


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])
def test_scores_match_dense_model(results, files, layout):
    items = read_task_file(files / "choices.jsonl") + read_task_file(files / "words.jsonl")
    want = results.once(("dense scores",), lambda: dense_scores(results.weights("qwen3"), items))
    for rank in results.judged(layout):
        scores, choices, words = rank["scores"], rank["choices"], rank["words"]
        assert scores[:, 0].tolist() == pytest.approx([log_p for log_p, _ in want], rel=1e-5)
        assert (scores[:, 1] == 0).tolist() == [greedy for _, greedy in want]
        best, place = [], 0
        for item in items[: len(CHOICES)]:
            own = [log_p for log_p, _ in want[place : place + len(item.options)]]
            best.append(own.index(max(own)) == item.gold)
            place += len(item.options)
        share = sum(best) / len(CHOICES)
        assert choices.accuracy == share
        assert choices.accuracy_stderr == pytest.approx(math.sqrt(share * (1 - share) / (len(CHOICES) - 1)))
        assert words.accuracy == sum(greedy for _, greedy in want[-2:]) / 2
        assert words.normalised is None


def test_texts_start_with_the_bos_token(files):
    (item,) = read_task_file(files / "words.jsonl")[:1]
    plain, begun = (rows_of([item], Tokenizer(encode, 128, 0, bos), 100)[0] for bos in (None, 7))
    assert begun.tokens == [7, *plain.tokens]
    assert begun.start == plain.start + 1
    cut = rows_of([item], Tokenizer(encode, 128, 0, 7), 4)[0]
    assert (cut.tokens, cut.start) == (begun.tokens[-5:], 5 - (len(begun.tokens) - begun.start))


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"query": "a", "choices": ["b"]}',
        '{"query": "a", "choices": ["b", "c"], "gold": 2}',
        '{"text": "one"}',
        "[1]",
        '{"query": "", "choices": ["b", "c"], "gold": 0}',
        '{"query": "a", "choices": ["b"], "gold": 0}',
    ],
)
def test_invalid_line_is_named(tmp_path, line):
    (tmp_path / "task.jsonl").write_text(json.dumps(CHOICES[0]) + "\n\n" + line + "\n")
    with pytest.raises(
        InputError,
        match=r"task\.jsonl line 3 is not a task item; it needs text, or query, choices \(two or more\)",
    ):
        read_task_file(tmp_path / "task.jsonl")


def test_last_word_and_choice_items_do_not_mix(tmp_path):
    """Their shares mean different things: chance is 0 and 1 in so many choices."""
    for first, second in ((CHOICES[0], WORDS[0]), (WORDS[0], CHOICES[0])):
        (tmp_path / "task.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in (first, first, second))
        )
        assert len(read_task_file(tmp_path / "task.jsonl", limit=2)) == 2
        with pytest.raises(InputError, match=r"task\.jsonl line 3 mixes last-word items and choice items"):
            read_task_file(tmp_path / "task.jsonl")


def test_files_without_items_are_rejected(tmp_path, files):
    with pytest.raises(InputError, match="there is no file"):
        read_task_file(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="contains no task item"):
        read_task_file(tmp_path / "empty.jsonl")
    assert len(read_task_file(files / "choices.jsonl", limit=2)) == 2
