"""Chats: the tokens of the assistant in the loss mask, on disk and in samples."""

import json
import pickle
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from chats import TEMPLATE, make_chat_tokenizer, make_chats, pieces_of, turn

from minitron_mp.config.data import DataConfig
from minitron_mp.config.recipe import make_recipe
from minitron_mp.data import shards, workers
from minitron_mp.data.batches import Corpus, microbatches, open_samples
from minitron_mp.data.chat_encoder import load_chat_encoder, token_mask
from minitron_mp.data.checks import corpus_problems
from minitron_mp.data.corpus import PARTS_FILE, counted_tokens, finish_corpus, open_text_of, tokenize_corpus
from minitron_mp.data.documents import Document
from minitron_mp.data.file_hashes import FileHashes
from minitron_mp.data.indexed_files import has_mask, lengths_of, mask_prefix
from minitron_mp.data.shards import ShardStore, divide
from minitron_mp.data.sources import corpus_fingerprint
from minitron_mp.data.tokenizer import load_tokenizer
from minitron_mp.data.unused import SURROGATE, load_unused
from minitron_mp.errors import InputError
from minitron_mp.workflow.stages import HELD_OUT, TOKENIZE

S = 32
CHAT = {"chat_field": "messages", "sequence_length": S}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def chats(tokenizer):
    """Encodes chats as (ids, mask). Each is a list of messages, or a record."""
    encoder = load_chat_encoder(tokenizer)

    def encode(*records):
        rows = [record if isinstance(record, dict) else {"messages": record} for record in records]
        documents = [Document("train", json.dumps(row), "a.jsonl", 1, True) for row in rows]
        return [(chat.ids, chat.mask.tolist()) for chat in encoder(documents)]

    return encode


def expected(tokenizer, pieces):
    """Token ids and mask of pieces that no token crosses, with the end of the document."""
    ids, mask = [], []
    for text, counts in pieces:
        (piece,) = tokenizer.encode([text])
        ids += piece
        mask += [counts] * len(piece)
    return [*ids, tokenizer.eod], [*mask, 0]


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def chat_file(path, count, first=0):
    return write_records(path, [{"messages": chat} for chat in make_chats(count, first)])


def tokenize(folder, tokenizer, **values):
    data = DataConfig(**{**CHAT, **values})
    return data, tokenize_corpus(data, tokenizer, folder, 1)


def three_parts(folder, **texts):
    """Each part from a file with chats, unless another text is given."""
    given = {
        part: [chat_file(folder / f"{part}.jsonl", 60, 100 * number)]
        for number, part in enumerate(("calibration", "train", "valid"))
    }
    return given | texts


def in_all_parts(path):
    """The same text for all parts."""
    return {part: [str(path)] for part in ("calibration", "train", "valid")}


def documents_of(prefix, dtype=np.uint16):
    """The documents of a dataset on disk."""
    ids = np.fromfile(f"{prefix}.bin", dtype)
    ends = np.cumsum(lengths_of(prefix))
    return [ids[a:b].tolist() for a, b in pairwise([0, *ends])]


def test_only_the_text_of_the_assistant_counts(tokenizer, chats):
    """With several turns, a system message, and characters of several tokens."""
    messages = make_chats(12)
    found = chats(*messages)
    assert found == [expected(tokenizer, pieces_of(chat)) for chat in messages]
    assert {len(chat) for chat in messages} == {3, 4, 6}


def test_masks_are_those_of_transformers(folder, chats):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    for chat, (ids, mask) in zip(make_chats(6), chats(*make_chats(6))):
        found = loaded.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert ids[:-1] == found["input_ids"]
        assert mask[:-1] == found["assistant_masks"]


@pytest.mark.parametrize(
    ("offsets", "spans", "mask"),
    [
        ([(0, 2), (2, 4), (4, 6)], [(2, 4)], [0, 1, 0]),
        ([(0, 2), (2, 4), (4, 6)], [(3, 5)], [0, 1, 1]),  # a token with one character of it counts
        ([(0, 2), (2, 4), (4, 6)], [(2, 2)], [0, 0, 0]),
        ([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], [(0, 2)], [1, 1, 1, 1, 0]),  # bytes of one character
        ([(0, 2), (3, 3), (3, 5)], [(2, 3)], [0, 1, 0]),  # white space that is not in the offsets
        ([(0, 2), (3, 5)], [(0, 3)], [1, 0]),  # white space without a token
        ([(0, 1), (1, 2), (2, 3)], [(0, 1), (2, 3)], [1, 0, 1]),
        ([], [], []),
    ],
)
def test_tokens_of_spans(offsets, spans, mask):
    assert token_mask(offsets, spans).tolist() == mask


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"a": 5}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 5, "b": [1.5, 2.5]}}}
WITH_TOOLS = {
    "messages": [
        turn("user", "add 5"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        turn("tool", "6"),
        turn("assistant", "It is 6"),
    ],
    "tools": [TOOL],
}


def test_tools_and_calls_are_those_of_the_template(tokenizer, chats):
    call = '<call>{"name": "add", "arguments": {"a": 5, "b": [1.5, 2.5]}}</call><|im_end|>'
    pieces = [
        (f"<|im_start|>system\n# Tools\n{json.dumps(TOOL)}\n<|im_end|>\n", 0),
        ("<|im_start|>user\nadd 5<|im_end|>\n<|im_start|>assistant\n", 0),
        (call, 1),
        ("\n<|im_start|>tool\n6<|im_end|>\n<|im_start|>assistant\n", 0),
        ("It is 6<|im_end|>", 1),
        ("\n", 0),
    ]
    assert chats(WITH_TOOLS) == [expected(tokenizer, pieces)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_formats_have_the_same_chats(tmp_path, tokenizer, chats, name):
    """Numbers stay integers. In a table each message has the fields of all others, with null."""
    records = [WITH_TOOLS, {"messages": make_chats(1)[0]}] * 2
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = [{**row, "tools": json.dumps(row["tools"]) if "tools" in row else None} for row in records]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name == "a.json":
        path.write_text(json.dumps(records))
    else:
        write_records(path, records)
    tokenize(tmp_path / "data", tokenizer, **in_all_parts(path))
    train = tmp_path / "data" / "train"
    found = list(zip(documents_of(train), documents_of(mask_prefix(train), np.uint8)))
    assert found == chats(*records)


USER, ANSWER = turn("user", "a"), turn("assistant", "b")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "a"}, r'has a string, not a list of messages, in the field "messages"; correct'),
        ({"messages": []}, r'has no messages in the field "messages"; correct or delete it, or set data'),
        ({"messages": [USER, "b"]}, r"has a string as message 2, not an object with role and content, in"),
        ({"messages": [{"content": "a"}]}, r'has no "role" of message 1, which must be a string, in'),
        ({"messages": [{"role": 1, "content": "a"}]}, r'has a number as "role" of message 1'),
        ({"messages": [USER, {"role": "assistant"}]}, r'has no "content" of message 2'),
        ({"messages": [{"role": "user", "content": None}]}, r'has null as "content" of message 1'),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
            r'has a list as "content" of message 1, .*; join the texts of its parts into one string',
        ),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            r'has "from" and "value" in message 1, .*; rename "from" and "value" of its messages to',
        ),
        ({"messages": [USER, ANSWER], "tools": "x"}, r'has a string in the field "tools", not a list of'),
        ({"messages": [USER]}, r"is a chat without text of the assistant, so no token of it counts in the"),
        ({"messages": [turn("bot", "a")]}, r"is a chat that the chat template cannot render \(unknown role"),
        ({"messages": None}, r'has no chat in the field "messages" and no field "text" \(its fields: mess'),
        ({"other": 1}, r'has no chat in the field "messages" and no field "text" \(its fields: other\)'),
    ],
)
def test_malformed_chats_are_located(tmp_path, tokenizer, record, message):
    path = write_records(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER]}, record])
    with pytest.raises(InputError, match=f"{path} line 2 {message}"):
        tokenize(tmp_path / "data", tokenizer, source=path, valid_fraction=0.3)
    path = write_records(tmp_path / "b.jsonl", [record])
    problems = corpus_problems(DataConfig(**CHAT, source=path), tmp_path, tokenizer, held_out=False)
    assert len(problems) == 1
    assert problems[0].startswith(f"{path} line 1 has " if " has " in problems[0] else f"{path} line 1 is ")


@pytest.mark.parametrize(
    ("template", "file", "message"),
    [
        (None, None, r"has no chat template; set data\.chat_template to a file with a template"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            None,
            r"the chat template of .* does not mark the text of the assistant, .*; set data\.chat_template "
            r"to a copy of it with \{% generation %\} and \{% endgeneration %\} around this text",
        ),
        (TEMPLATE, "{{ messages }}", r"data\.chat_template .*/template\.jinja does not mark the text of"),
        (
            None,
            TEMPLATE + "{{ strftime_now('%d %B %Y') }}",
            r"writes the current date \(strftime_now\) into each chat, .*; set data\.chat_template to a copy",
        ),
        (None, "{% generation %}", r"template\.jinja is no valid Jinja template: line 1: .*; correct it"),
        (None, b"\xff", r"template\.jinja is not UTF-8 text .*; convert it"),
    ],
)
def test_templates_without_marks_are_rejected(tmp_path, template, file, message):
    tokenizer = load_tokenizer(make_chat_tokenizer(tmp_path / "tokenizer", template))
    values = {}
    if file is not None:
        values["chat_template"] = str(tmp_path / "template.jinja")
        (tmp_path / "template.jinja").write_bytes(file if isinstance(file, bytes) else file.encode())
    source = chat_file(tmp_path / "a.jsonl", 3)
    data = DataConfig(**CHAT, source=source, **values)
    with pytest.raises(InputError, match=message):
        tokenize_corpus(data, tokenizer, tmp_path / "data", 1)
    (problem,) = corpus_problems(data, tmp_path, tokenizer, held_out=False)
    with pytest.raises(InputError, match=message):
        raise InputError(problem)


def test_template_of_the_recipe_replaces_that_of_the_tokenizer(tmp_path, chats):
    tokenizer = load_tokenizer(make_chat_tokenizer(tmp_path / "tokenizer", "{{ messages }}"))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    tokenize(
        tmp_path / "data", tokenizer, **three_parts(tmp_path), chat_template=str(tmp_path / "chat.jinja")
    )
    found = documents_of(tmp_path / "data" / "train")
    assert found == [ids for ids, _ in chats(*make_chats(60, 100))]


def test_tokenizers_without_positions_are_rejected(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"does not give the positions of tokens in a text; set data\.tok"):
        load_chat_encoder(replace(tokenizer, encode=lambda texts: [[1] for _ in texts]))


def test_documents_without_chats_are_tokenized_as_before(tmp_path, tokenizer):
    """Text files and records with the field of the text count fully. They may be in the same source."""
    texts = [{"text": f"text {i} of a file"} for i in range(20)]
    write_records(tmp_path / "texts" / "a.jsonl", texts)
    (tmp_path / "texts" / "c.txt").write_text("some words in a file\n" * 50)
    names = ("calibration", "train", "valid")
    plain = in_all_parts(tmp_path / "texts")
    tokenize(tmp_path / "plain", tokenizer, **plain, chat_field=None)
    assert not has_mask(tmp_path / "plain" / "train")
    assert list(json.loads((tmp_path / "plain" / PARTS_FILE).read_text())) == list(names)

    chat_file(tmp_path / "texts" / "b.jsonl", 10)
    tokenize(tmp_path / "mixed", tokenizer, **plain)
    train = tmp_path / "mixed" / "train"
    found, masks = documents_of(train), documents_of(mask_prefix(train), np.uint8)
    assert found[:20] + found[30:] == documents_of(tmp_path / "plain" / "train")
    assert all(all(mask) for mask in masks[:20] + masks[30:])
    assert all(0 < sum(mask) < len(mask) for mask in masks[20:30])
    counted = counted_tokens(tmp_path / "mixed", names)
    assert counted == dict.fromkeys(names, sum(map(sum, masks)))
    assert counted_tokens(tmp_path / "plain", names) == {}


def test_half_of_a_surrogate_pair_is_replaced(tmp_path, tokenizer, chats):
    path = tmp_path / "a.jsonl"
    line = '{"messages": [{"role": "user", "content": "a \\ud83d b"}, {"role": "assistant", "content": "c"}]}'
    path.write_text(line + "\n")
    tokenize(tmp_path / "data", tokenizer, **in_all_parts(path))
    expected_ids = chats([turn("user", "a \ufffd b"), turn("assistant", "c")])[0][0]
    assert documents_of(tmp_path / "data" / "train") == [expected_ids]
    assert load_unused(tmp_path / "data").tallies[SURROGATE].count == 3


def test_chats_are_not_cut(tmp_path, tokenizer, chats):
    """Pieces of a source with few documents are divided among the parts. A chat is one piece."""
    long = [USER, turn("assistant", "word " * 3000)]
    records = [{"messages": long}, *({"messages": chat} for chat in make_chats(40))]
    path = write_records(tmp_path / "a.jsonl", records)
    tokenize(tmp_path / "data", tokenizer, source=path, valid_fraction=0.1)
    found = []
    for part in ("calibration", "train", "valid"):
        found += documents_of(tmp_path / "data" / part)
    assert sorted(found) == sorted(ids for ids, _ in chats(long, *make_chats(40)))


@pytest.mark.parametrize("eos", ["<|endoftext|>", "<|im_end|>"])
@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_loss_mask_of_a_sample_is_that_of_its_labels(tmp_path, one_rank, eos, eod_mask_loss):
    """Documents are chats, also if each message ends with the token that ends a document."""
    tokenizer = load_tokenizer(make_chat_tokenizer(tmp_path / "tokenizer", eos=eos))
    values = {"eod_mask_loss": eod_mask_loss, "document_mask": True}
    data, counts = tokenize(tmp_path / "data", tokenizer, **three_parts(tmp_path), **values)
    train = tmp_path / "data" / "train"
    documents = list(zip(documents_of(train), documents_of(mask_prefix(train), np.uint8)))
    corpus = Corpus(tmp_path / "data", tokenizer, S, 1, data=data)
    count = counts["train"] // S
    samples = open_samples(corpus, "train", count, repeat=True)
    rows = {tuple([*ids, number]): mask for number, (ids, mask) in enumerate(documents)}
    counted = crossed = 0
    for i in range(count):
        sample = samples[i]
        tokens = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
        numbers = sample["documents"].tolist()
        for number in range(numbers[-1] + 1):
            first, size = numbers.index(number), numbers.count(number)
            # One more token is in the document, unless it ends in the sample.
            more = number == numbers[-1]
            piece = tokens[first : first + size + more]
            found = [
                mask[at : at + len(piece)]
                for (*ids, _), mask in rows.items()
                for at in range(len(ids) - len(piece) + 1)
                if ids[at : at + len(piece)] == piece and (at == 0 or first == 0)
            ]
            label_mask = sample["loss_mask"][first : first + len(piece) - 1].int().tolist()
            assert label_mask in [mask[1:] for mask in found]
            if not more:  # the label of the last token is the first token of the next document
                assert sample["loss_mask"][first + size - 1] == 0
                crossed += 1
            counted += sum(label_mask)
    assert crossed > 20
    assert counted > 200
    whole = microbatches(samples, 0, global_batch_size=4, micro_batch_size=2, dp_rank=0, dp_size=1)
    assert torch.equal(whole[0]["loss_mask"][1], samples[1]["loss_mask"])


def test_blend_of_chats_and_plain_text(tmp_path, one_rank, tokenizer):
    """A text without a mask counts fully."""
    plain = write_records(tmp_path / "plain.jsonl", [{"text": "plain words " * 20}] * 40)
    chat = chat_file(tmp_path / "chat.jsonl", 200)
    texts = {"calibration": [plain], "train": {plain: 1, chat: 3}, "valid": {chat: 1}}
    data, _ = tokenize(tmp_path / "data", tokenizer, **texts, document_mask=True)
    assert [has_mask(tmp_path / "data" / name) for name in ("train_0", "train_1")] == [False, True]
    samples = open_samples(Corpus(tmp_path / "data", tokenizer, S, 1, data=data), "train", 80, repeat=True)
    rows = microbatches(samples, 0, global_batch_size=80, micro_batch_size=80, dp_rank=0, dp_size=1)[0]
    counted = rows["loss_mask"].sum(1)
    assert int((counted == S).sum()) == 20
    assert rows["documents"].shape == (80, S)


def test_held_out_parts_of_fixed_size_keep_their_masks(tmp_path, tokenizer, chats):
    path = chat_file(tmp_path / "a.jsonl", 900)
    tokenize(tmp_path / "data", tokenizer, source=path, valid_fraction=0.3, valid_tokens=2000)
    known = sorted(chats(*make_chats(900)))
    found = []
    for name in ("calibration", "valid", "train"):
        prefix = tmp_path / "data" / name
        found += zip(documents_of(prefix), documents_of(mask_prefix(prefix), np.uint8))
    assert sorted(found) == known
    assert not list((tmp_path / "data").glob("*.new*"))
    assert not list((tmp_path / "data").glob("surplus*"))


def test_megatron_data_has_its_masks(tmp_path, one_rank, tokenizer):
    """As a part, and divided by document. Its fingerprint has the masks."""
    tokenize(tmp_path / "first", tokenizer, **three_parts(tmp_path))
    prefix = tmp_path / "first" / "train"
    first = sorted(zip(documents_of(prefix), documents_of(mask_prefix(prefix), np.uint8)))
    data, _ = tokenize(tmp_path / "again", tokenizer, source=str(prefix), valid_fraction=0.2, chat_field=None)
    again = []
    for part in ("calibration", "train", "valid"):
        found = tmp_path / "again" / part
        again += zip(documents_of(found), documents_of(mask_prefix(found), np.uint8))
    assert sorted(again) == first

    parts = in_all_parts(prefix)
    data, _ = tokenize(tmp_path / "parts", tokenizer, **parts, chat_field=None)
    corpus = Corpus(tmp_path / "parts", tokenizer, S, 1, data=data)
    assert 0 < open_samples(corpus, "train", 4, repeat=True)[0]["loss_mask"].mean() < 1
    before = corpus_fingerprint(data)
    mask = mask_prefix(prefix).with_name("train.loss_mask.bin")
    content = mask.read_bytes()
    mask.write_bytes(bytes(len(content)))
    assert corpus_fingerprint(data) != before
    mask.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"train\.loss_mask\.bin has .* create or copy it again"):
        tokenize(tmp_path / "bad", tokenizer, **parts, chat_field=None)
    other = mask_prefix(tmp_path / "first" / "valid")
    for suffix in ("bin", "idx"):
        mask.with_suffix(f".{suffix}").write_bytes(other.with_name(f"{other.name}.{suffix}").read_bytes())
    with pytest.raises(
        InputError, match=r"must have one byte for each of its tokens, and the same documents"
    ):
        tokenize(tmp_path / "bad", tokenizer, **parts, chat_field=None)
    for suffix in ("bin", "idx"):
        mask.with_suffix(f".{suffix}").unlink()
    with pytest.raises(InputError, match=r"the loss mask of chats, is missing; restore it, or run"):
        open_samples(corpus, "train", 4, repeat=True)


def test_field_that_no_record_has_is_rejected(tmp_path, tokenizer):
    path = write_records(tmp_path / "a.jsonl", [{"text": f"words {i}"} for i in range(400)])
    with pytest.raises(InputError, match=r'data\.chat_field: no record of the text has the field "messages"'):
        tokenize(tmp_path / "data", tokenizer, source=path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_mixed(folder):
    """Files of which some have no chat. The first file with a chat is not the first one."""
    for number in range(6):
        path = folder / f"{number}.jsonl"
        if number in (0, 3):
            write_records(path, [{"text": f"text {i} of {number}"} for i in range(60)])
        else:
            chat_file(path, 20, 20 * number)
    return str(folder)


class Killed(Exception):
    """Raised in the middle of a shard."""


def shards_of(tmp_path, tokenizer, data):
    text = open_text_of(data, tokenizer, 1, output=tmp_path)
    return text, ShardStore(tmp_path / "shards" / "data", text.job, "a tokenizer"), divide(text.files)


def test_shards_do_not_change_the_masks(tmp_path, tokenizer, monkeypatch):
    """Also after a kill, and with a store that was sent to a worker."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    data = DataConfig(**CHAT, source=make_mixed(tmp_path / "texts"), valid_fraction=0.1)
    counts = tokenize_corpus(data, tokenizer, tmp_path / "whole", 1)
    text, store, divided = shards_of(tmp_path, tokenizer, data)
    assert len(divided) == 6
    sent = pickle.loads(pickle.dumps(replace(store, job=replace(store.job, batch_characters=500))))
    sent.make(divided[0])
    sent.make(divided[1])

    def kill(documents):
        raise Killed

    with pytest.raises(Killed):
        sent.make(divided[2], kill)
    hashes = FileHashes(tmp_path)
    missing = [shard for shard in divided if not store.is_done(shard, hashes)]
    assert [shard.number for shard in missing] == [2, 3, 4, 5]
    for shard in missing:
        sent.make(shard)
    assert not has_mask(store.folder / "00000" / "train")
    assert has_mask(store.folder / "00001" / "train")
    (tmp_path / "merged").mkdir()
    written = store.put_together(divided, tmp_path / "merged")
    assert finish_corpus(text, written, tmp_path / "merged") == counts
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")

    (store.folder / "00001" / "train.loss_mask.bin").unlink()
    other = replace(store, job=replace(store.job, chats=replace(store.job.chats, templates={"default": "x"})))
    assert not store.is_done(divided[1], hashes)
    assert store.is_done(divided[2], hashes)
    assert not other.is_done(divided[2], hashes)


@pytest.mark.slow
def test_workers_encode_chats(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    data = DataConfig(**CHAT, source=make_mixed(tmp_path / "texts"), valid_fraction=0.1)
    tokenize_corpus(data, tokenizer, tmp_path / "whole", 1)
    text, store, divided = shards_of(tmp_path, tokenizer, data)
    workers.make_shards(store, divided, 2)
    (tmp_path / "merged").mkdir()
    finish_corpus(text, store.put_together(divided, tmp_path / "merged"), tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def test_settings_of_chats_belong_to_the_text(tmp_path):
    def settings(**data):
        recipe = make_recipe({"model": "m", "output": str(tmp_path / "out"), "data": data})
        files = TOKENIZE.sources(recipe)
        return TOKENIZE.settings(recipe), HELD_OUT.settings(recipe), files

    plain, plain_texts, files = settings()
    assert plain == {"valid_fraction": 0.03, "seed": plain["seed"]}
    assert (plain_texts, list(files)) == ({}, ["text"])
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    chat, chat_texts, files = settings(chat_field="messages", chat_template=str(template))
    assert chat == {**plain, "chat_field": "messages"}
    assert chat_texts == {"chat_field": "messages"}
    before = files["chat template"].fingerprint()
    template.write_text(TEMPLATE + "\n")
    assert files["chat template"].fingerprint() != before
    with pytest.raises(InputError, match="chat_template needs chat_field"):
        settings(chat_template=str(template))
