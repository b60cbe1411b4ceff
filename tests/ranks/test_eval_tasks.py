"""Choice tasks on the sharded model match a dense model; task files are validated."""

from __future__ import annotations

import gzip
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
from minitron_mp.evaluation.task_files import check_tokens, read_task_file

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
        '{"query": "a", "choices": ["b", "c"], "gold": true}',
        '{"query": "a", "choices": ["b", ["c"]], "gold": 0}',
        '{"text": "not a last word", "choices": ["b", "c"], "gold": 0}',
        "null",
    ],
)
def test_invalid_line_is_named(tmp_path, line):
    (tmp_path / "task.jsonl").write_text(json.dumps(CHOICES[0]) + "\n\n" + line + "\n")
    with pytest.raises(
        InputError,
        match=r"task\.jsonl line 3 is not a task item; it needs text, or query, choices \(two or more\)",
    ):
        read_task_file(tmp_path / "task.jsonl")


@pytest.mark.parametrize("name", ["choices", "context_options"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"text": ["b", "c", "d"], "label": ["A", "B", "C"]},
            r"has an object in the field \"NAME\", not a list; .*, for example the list in NAME\.text",
        ),
        ({"A": "b", "B": "c"}, r"has an object in the field \"NAME\", not a list; give a list of strings$"),
        ("bc", r"has a string in the field \"NAME\", not a list"),
        (2, r"has a number in the field \"NAME\", not a list"),
    ],
)
def test_options_must_be_a_list(tmp_path, name, value, message):
    """Items over the keys of an object, as of ARC on the Hub, would give a wrong accuracy."""
    row = {"query": "a", "continuation": "a", name: value, "gold": 1}
    (tmp_path / "task.jsonl").write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=rf"task\.jsonl line 2 {message.replace('NAME', name)}"):
        read_task_file(tmp_path / "task.jsonl")


def test_fields_with_null_are_ignored(tmp_path):
    """Rows of several kinds that were saved as one table have null in the fields of the others."""
    row = {"text": "the last word", "choices": None, "gold": None}
    (tmp_path / "task.jsonl").write_text(json.dumps(row))
    assert read_task_file(tmp_path / "task.jsonl")[0].options == [("the last", "word")]
    (tmp_path / "task.jsonl").write_text(json.dumps(CHOICES[0] | {"text": None, "context_options": None}))
    assert read_task_file(tmp_path / "task.jsonl")[0].gold == CHOICES[0]["gold"]


@pytest.mark.parametrize(
    "row",
    [
        {**CHOICES[0], "query": "half \ud83d a pair"},
        {**CHOICES[0], "choices": ["a", "\ude00"]},
        {"context_options": ["a \ud800", "b"], "continuation": "c", "gold": 0},
        {"text": "words \udfff last"},
    ],
)
def test_half_of_a_surrogate_pair_is_named(tmp_path, row):
    """Items are not repaired, because a changed item is another measurement."""
    (tmp_path / "task.jsonl").write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"task\.jsonl line 2 has half of a surrogate pair \(\\u[d-f]"):
        read_task_file(tmp_path / "task.jsonl")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\ufeff"])
def test_marks_and_line_ends_of_task_files(tmp_path, encoding, end):
    text = end.join(json.dumps(row) for row in CHOICES)
    (tmp_path / "task.jsonl").write_bytes(text.encode(encoding))
    (tmp_path / "task.jsonl.gz").write_bytes(gzip.compress(text.encode(encoding)))
    items = read_task_file(tmp_path / "task.jsonl")
    assert [item.gold for item in items] == [row["gold"] for row in CHOICES]
    assert read_task_file(tmp_path / "task.jsonl.gz") == items


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a b"}\n{"text": "caf\xe9"}', r"is not UTF-8 text: line 2, byte 0xe9 at offset 29"),
        (b'{"text": "a b"}\n' + b"[" * 5000, r"line 2 is not a task item"),
        ('{"text": "a b"}'.encode("utf-16-le"), r"seems to be UTF-16LE without a byte order mark"),
    ],
)
def test_invalid_bytes_of_task_files_are_named(tmp_path, content, message):
    (tmp_path / "task.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=rf"task\.jsonl {message}"):
        read_task_file(tmp_path / "task.jsonl")


def test_item_with_a_token_without_embedding_is_named(tmp_path, files):
    path = files / "words.jsonl"
    items = read_task_file(path)
    largest = max(max(ids) for ids in encode([" ".join(option) for item in items for option in item.options]))
    check_tokens(items, Tokenizer(encode, 128, 0, num_embeddings=largest + 1), path)
    small = Tokenizer(encode, 128, 0, num_embeddings=largest)
    with pytest.raises(
        InputError, match=rf"words\.jsonl line \d has the token '{largest}' .* {largest} rows"
    ):
        check_tokens(items, small, path)
    with pytest.raises(InputError, match=r"an item of a task has the token"):
        rows_of(items, small, 100)


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
