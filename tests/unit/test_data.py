import json
import os
import platform
import re
import shutil
import sysconfig
from collections import Counter

import numpy as np
import pytest
import torch

from minitron_mp.config.data import DataConfig
from minitron_mp.data.batches import Corpus, epochs_in_order, microbatches, open_samples, too_short_problems
from minitron_mp.data.checks import corpus_problems
from minitron_mp.data.corpus import prefixes_of, tokenize_corpus, tokens_of
from minitron_mp.data.sources import PARTS, corpus_fingerprint
from minitron_mp.data.tokenizer import Tokenizer, for_model, load_tokenizer
from minitron_mp.errors import InputError

LINES = [
    f"def function_{i}(x): return x + {i}  # the {i}th way to say it, with some words\n" for i in range(400)
]
S = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE folder that adds <s> and </s> to a text if special tokens are requested."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def decode(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).decode


def stream(prefix) -> np.ndarray:
    """All tokens of a prefix that tokenize() wrote, in the order on disk."""
    return np.fromfile(f"{prefix}.bin", dtype=np.uint16).astype(np.int64)


def texts(prefix, decode, eod) -> list[str]:
    """Return the documents with their eod; assert that each starts with the bos id 0."""
    ids = stream(prefix)
    pieces = np.split(ids, np.flatnonzero(ids == eod) + 1)[:-1]
    assert all(first == 0 for first, *_ in pieces)
    return [decode(piece[1:].tolist()) for piece in pieces]


def lists(tmp_path, **sizes) -> DataConfig:
    """One .txt of so many lines for each part."""
    for part in PARTS:
        (tmp_path / f"{part}.txt").write_text("".join(LINES[: sizes[part]]))
    return DataConfig(**{part: [str(tmp_path / f"{part}.txt")] for part in PARTS})


@pytest.fixture
def corpus(tmp_path, tokenizer):
    """Parts of 8, 40 and 12 lines, each one document: samples are windows of one stream."""
    tokenize_corpus(lists(tmp_path, calibration=8, train=40, valid=12), tokenizer, tmp_path / "data", 1)
    return tmp_path / "data"


def windows(prefix) -> Counter:
    ids = stream(prefix)
    return Counter(tuple(ids[i : i + S + 1].tolist()) for i in range(0, len(ids) - S, S))


def rows(dataset, count=None) -> list[tuple[int, ...]]:
    """Each sample as s + 1 tokens; checks that labels are the tokens one further."""
    found = []
    for i in range(len(dataset) if count is None else count):
        item = dataset[i]
        assert torch.equal(item["labels"][:-1], item["tokens"][1:])
        found.append((*item["tokens"].tolist(), int(item["labels"][-1])))
    return found


def test_hugging_face_tokenizer_folder(tokenizer, decode):
    ids = tokenizer.encode(["a few words", "x"])
    assert (tokenizer.bos, tokenizer.eod) == (0, 1)
    assert tokenizer.vocab_size == 320
    assert not {0, 1} & {i for row in ids for i in row}
    assert decode(ids[0]) == "a few words"


def test_sentencepiece_file(tmp_path):
    import sentencepiece

    def train(name, **options):
        prefix = str(tmp_path / name)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_prefix=prefix, vocab_size=80, minloglevel=2, **options
        )
        return prefix + ".model"

    tokenizer = load_tokenizer(train("good"))
    assert (tokenizer.vocab_size, tokenizer.eod) == (80, 2)
    first, second = tokenizer.encode([LINES[0], LINES[1]])
    assert first != second
    assert not {1, 2} & {*first, *second}
    with pytest.raises(InputError, match="no end-of-sequence"):
        load_tokenizer(train("endless", eos_id=-1))


def test_invalid_tokenizers_are_rejected(tmp_path, folder, tokenizer):
    with pytest.raises(InputError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(InputError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "bad.model").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"bad\.model cannot be read"):
        load_tokenizer(tmp_path / "bad.model")
    for file in folder.iterdir():
        (tmp_path / file.name).write_text(
            file.read_text().replace('"eos_token": "</s>"', '"sep_token": "</s>"')
        )
    assert load_tokenizer(tmp_path).eod == 1
    (tmp_path / "tokenizer_config.json").write_text(
        (folder / "tokenizer_config.json").read_text().replace('"eos_token": "</s>"', '"eos_token": null')
    )
    with pytest.raises(InputError, match="no end-of-sequence"):
        load_tokenizer(tmp_path)


def test_tokenizer_of_own_code_is_read_from_tokenizer_json(tmp_path, folder, tokenizer):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "MyTok",
        "auto_map": {"AutoTokenizer": ["tokenization_my.MyTok", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(LINES) == tokenizer.encode(LINES)
    assert (loaded.bos, loaded.eod) == (tokenizer.bos, tokenizer.eod)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(
        InputError, match=r"is the class MyTok of a Python file in it, which is not run; save"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: (path / "chat_template.jinja").write_text("{{ a }}", "utf-16"), "jinja is UTF-16 text"),
        (
            lambda path: (path / "chat_template.jinja").write_bytes(b"caf\xe9"),
            "jinja is damaged or not UTF-8",
        ),
        (
            lambda path: (path / "config.json").write_text('{"model_type": "llama", "pad_token_id": "2"}'),
            "config.json cannot be read by transformers",
        ),
    ],
)
def test_file_that_stops_the_tokenizer_is_named(tmp_path, folder, change, words):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    change(tmp_path)
    with pytest.raises(InputError, match=words):
        load_tokenizer(tmp_path)


def test_end_of_text_may_be_in_config_json(tmp_path, folder):
    text = (folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=r"set eos_token in tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": [1, 2]}')
    assert load_tokenizer(tmp_path).eod == 1


def test_tokenizer_may_have_ids_without_embedding(tmp_path, folder):
    """A text with such an id is rejected, with the line. eod and bos need an embedding."""
    from transformers import AutoTokenizer

    padded = AutoTokenizer.from_pretrained(folder)
    padded.add_special_tokens({"pad_token": "<pad>"})
    padded.save_pretrained(tmp_path / "padded")
    tokenizer = for_model(load_tokenizer(tmp_path / "padded"), 320)
    assert (tokenizer.vocab_size, tokenizer.num_embeddings) == (321, 320)
    data = lists(tmp_path, calibration=8, train=40, valid=12)
    tokenize_corpus(data, tokenizer, tmp_path / "data", 1)
    text = tmp_path / "valid.txt"
    text.write_text("".join(LINES[:5]) + "a <pad> token\n" + LINES[5])
    with pytest.raises(
        InputError, match=r"valid\.txt line 6 has the token '<pad>' with id 320, but .* 320 rows"
    ):
        tokenize_corpus(data, tokenizer, tmp_path / "data", 1)
    problems = corpus_problems(data, tmp_path / "out", tokenizer)
    assert len(problems) == 1
    assert "valid.txt line 6 has the token" in problems[0]
    text.write_text("".join(LINES[:5]))
    assert corpus_problems(data, tmp_path / "out", tokenizer) == []
    with pytest.raises(InputError, match=r"end-of-document token '</s>' has id 1, .* has 1 rows"):
        for_model(tokenizer, 1)


def test_stdlib_split_is_disjoint_and_deterministic(tmp_path, monkeypatch, tokenizer, decode):
    root, files = tmp_path / "lib", {f"package/module_{i}.py": f"value = {i}\n" for i in range(60)}
    for name, text in {
        **files,
        "blank.py": "\n",
        "test/t.py": "no",
        "a/tests/t.py": "no",
        "site-packages/p.py": "no",
        "notes.txt": "no",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "latin.py").write_bytes(b"name = '\xe9'\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))

    data, done = DataConfig(valid_fraction=0.2), []
    counts = tokenize_corpus(data, tokenizer, tmp_path / "one", 1, progress=done.append)
    assert counts == {part: len(stream(tmp_path / "one" / part)) for part in PARTS}
    assert done == [60]
    parts = {part: texts(tmp_path / "one" / part, decode, tokenizer.eod) for part in PARTS}
    assert sorted(text for part in PARTS for text in parts[part]) == sorted(
        text + "</s>" for text in files.values()
    )
    assert [len(parts[part]) for part in PARTS] == [
        7,
        41,
        12,
    ]  # written down from a first run: the same on every machine
    assert (
        corpus_fingerprint(data) == f"python-stdlib {platform.python_version()}: 62 files, "
        f"{sum(map(len, files.values())) + 1 + 11} bytes"
    )

    tokenize_corpus(data, tokenizer, tmp_path / "two", 1)
    tokenize_corpus(data, tokenizer, tmp_path / "three", 2)
    one, two, three = ((tmp_path / name / "valid.bin").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_real_stdlib_has_text():
    name, rest = corpus_fingerprint(DataConfig()).split(": ")
    assert name == f"python-stdlib {platform.python_version()}"
    assert int(rest.split()[0]) > 300


def test_single_txt_is_split_at_blank_lines(tmp_path, tokenizer, decode):
    text = "".join(line + "\n" * (i % 5 == 4) for i, line in enumerate(LINES * 8))
    (tmp_path / "book.txt").write_text(text)
    data = DataConfig(source=str(tmp_path / "book.txt"), valid_fraction=0.2)
    tokenize_corpus(data, tokenizer, tmp_path / "data", 1)
    pieces = [
        piece.removesuffix("</s>")
        for part in PARTS
        for piece in texts(tmp_path / "data" / part, decode, tokenizer.eod)
    ]
    assert len(pieces) > 30
    assert sum(map(len, pieces)) == len(text)
    assert sum(4000 <= len(piece) < 5000 and piece.endswith("\n\n") for piece in pieces) >= len(pieces) - 1


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_few_long_documents_are_split(tmp_path, tokenizer, suffix):
    text = "".join(line + "\n" * (i % 5 == 4) for i, line in enumerate(LINES * 8))
    (tmp_path / "books").mkdir()
    for name in "abc":
        (tmp_path / "books" / f"{name}{suffix}").write_text(
            text if suffix == ".txt" else json.dumps({"text": text}) + "\n"
        )
    tokens = tokenize_corpus(
        DataConfig(source=str(tmp_path / "books"), valid_fraction=0.1), tokenizer, tmp_path / "data", 1
    )
    for part in ("calibration", "valid"):
        assert 0.02 < tokens[part] / sum(tokens.values()) < 0.2


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_documents_are_not_split_across_parts(tmp_path, tokenizer, decode, suffix):
    """If there are enough documents, no document is split, however long it is."""
    (tmp_path / "books").mkdir()
    books = {
        f"{i:03}": "\n\n".join(f"book {i:03}, {line}" for line in LINES * (3 if i % 10 == 0 else 1))
        for i in range(60)
    }
    if suffix == ".txt":
        for name, text in books.items():
            (tmp_path / "books" / f"{name}.txt").write_text(text)
    else:
        (tmp_path / "books" / "all.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in books.values())
        )
    tokenize_corpus(
        DataConfig(source=str(tmp_path / "books"), valid_fraction=0.2), tokenizer, tmp_path / "data", 1
    )
    found = {
        part: set(re.findall(r"book (\d+),", "".join(texts(tmp_path / "data" / part, decode, tokenizer.eod))))
        for part in PARTS
    }
    assert sum(map(len, found.values())) == 60
    assert set.union(*found.values()) == books.keys()
    assert min(len(found["valid"]), len(found["calibration"])) >= 4


def test_parts_accept_files_folders_and_megatron_data(tmp_path, corpus, tokenizer, decode):
    (tmp_path / "more/deep").mkdir(parents=True)
    (tmp_path / "more/b.jsonl").write_text(
        '{"text": "second", "id": 1}\n\n{"text": "third"}\n{"text": " "}\n'
    )
    (tmp_path / "more/a.txt").write_text("first")
    (tmp_path / "more/deep/c.txt").write_text("fourth")
    train = [str(tmp_path / "more"), f"{corpus}/train.bin"]
    data = DataConfig(calibration=[f"{corpus}/calibration"], train=train, valid=[f"{corpus}/valid.idx"])
    counts = tokenize_corpus(data, tokenizer, tmp_path / "new", 1)

    assert texts(tmp_path / "new/train", decode, tokenizer.eod) == [
        "first</s>",
        "second</s>",
        "third</s>",
        "fourth</s>",
    ]
    assert json.loads((tmp_path / "new/parts.json").read_text())["train"] == ["train", f"{corpus}/train"]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "train.bin",
        "train.idx",
        "parts.json",
        "text.json",
    }
    assert counts["train"] == len(stream(tmp_path / "new/train")) + len(stream(corpus / "train"))
    before = corpus_fingerprint(data)
    (tmp_path / "more/a.txt").write_text("First")
    assert corpus_fingerprint(data) != before


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({}, "nowhere", r"data\.source: .*nowhere does not exist"),
        ({}, [], r"data\.source is empty"),
        ({"x.csv": "a"}, "x.csv", r"x\.csv is neither a text file \(\.txt, \.jsonl"),
        ({"x.csv": "a"}, ".", r"folder without text files \(.*it has files of other kinds: 1 \(x\.csv\)"),
        (
            {"a.txt": "one"},
            "a.txt",
            r"no text for .*source has 1 documents .*data\.valid_fraction \(0\.03\)",
        ),
        ({"a.txt": " \n"}, "a.txt", r"no text for calibration, train, valid: source has 0 documents"),
        ({"a.jsonl": '{"text": "x"}\n{"text": \n'}, "a.jsonl", r"a\.jsonl line 2 is not a JSON object"),
        ({"a.jsonl": '{"content": "x"}\n'}, "a.jsonl", r'a\.jsonl line 1 .*"text"'),
        ({"a.jsonl": '["text"]\n'}, "a.jsonl", r"a\.jsonl line 1 is not a"),
        ({"a.jsonl": '{"text": 3}\n'}, "a.jsonl", r"a\.jsonl line 1 has a number in the field"),
        ({"a.txt": b"caf\xe9"}, "a.txt", r"a\.txt is not UTF-8 text: line 1, byte 0xe9 at offset 3"),
        ({"a.bin": "", "a.idx": ""}, "a", r"a.bin and .idx are not a Megatron indexed dataset"),
    ],
)
def test_invalid_sources_are_rejected(tmp_path, monkeypatch, tokenizer, files, source, message):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        tokenize_corpus(DataConfig(source=source), tokenizer, tmp_path / "out", 1)


def test_invalid_parts_are_reported_together(tmp_path, corpus, tokenizer):
    with pytest.raises(InputError, match=r"(?s)data\.calibration: gone .*data\.valid: lost "):
        tokenize_corpus(
            DataConfig(calibration=["gone"], train=[f"{corpus}/train"], valid=["lost"]),
            tokenizer,
            tmp_path / "out",
            1,
        )
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(InputError, match="no text for valid: its documents are blank; give text"):
        tokenize_corpus(
            DataConfig(
                calibration=[f"{corpus}/valid"],
                train=[f"{corpus}/train"],
                valid=[str(tmp_path / "blank.txt")],
            ),
            tokenizer,
            tmp_path / "out",
            1,
        )


def test_invalid_megatron_data_is_rejected(tmp_path, corpus, tokenizer):
    data = DataConfig(**{part: [f"{corpus}/{part}"] for part in PARTS})
    small = Tokenizer(tokenizer.encode, 200, tokenizer.eod)
    with pytest.raises(
        InputError, match=r"calibration has token id \d+, but the tokenizer has ids up to 199"
    ):
        tokenize_corpus(data, small, tmp_path / "out", 1)
    size = (corpus / "train.bin").stat().st_size
    (corpus / "train.bin").write_bytes((corpus / "train.bin").read_bytes()[:100])
    with pytest.raises(
        InputError, match=rf"train\.bin has 100 bytes, but its index lists {size // 2} tokens"
    ):
        tokenize_corpus(data, tokenizer, tmp_path / "out", 1)


def test_damaged_index_is_rejected(tmp_path, corpus, tokenizer):
    (corpus / "train.idx").write_bytes(b"junk" * 10)
    with pytest.raises(InputError, match=r"train\.bin and \.idx are not a Megatron indexed dataset"):
        tokenize_corpus(
            DataConfig(**{part: [f"{corpus}/{part}"] for part in PARTS}), tokenizer, tmp_path / "out", 1
        )
    with (corpus / "valid.idx").open("r+b") as file:
        file.truncate(20)
    (corpus / "train.idx").unlink()
    with pytest.raises(InputError, match=r"valid\.bin and \.idx are not a Megatron indexed dataset"):
        tokenize_corpus(DataConfig(source=f"{corpus}/valid"), tokenizer, tmp_path / "out", 1)


def test_samples_concatenate_to_the_text(corpus, tokenizer):
    whole = windows(corpus / "train")
    dataset = open_samples(Corpus(corpus, tokenizer, S, 1), "train", 10, repeat=True)
    found = rows(dataset)
    assert Counter(found) == whole  # one epoch, each window once
    item = dataset[0]
    assert {key: item[key].dtype for key in item} == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
    }
    assert all(
        (dataset[i]["loss_mask"] == 1).all() for i in range(len(dataset))
    )  # pad is -1: no label is masked
    assert item["position_ids"].tolist() == list(range(S))
    assert rows(open_samples(Corpus(corpus, tokenizer, S, 1), "train", 10, repeat=True)) == found
    assert rows(open_samples(Corpus(corpus, tokenizer, S, 2), "train", 10, repeat=True)) != found


def open_twice(corpus, folder) -> list[list[tuple[int, ...]]]:
    """On a rank: the samples of two openings in a row."""
    tokenizer = load_tokenizer(folder)
    return [rows(open_samples(Corpus(corpus, tokenizer, S, 1), "train", 10, repeat=True)) for _ in range(2)]


def cut_index_short(corpus) -> None:
    """Truncate the index like a kill during numpy.save. Megatron accepts any file of that name."""
    files = list((corpus / "index").rglob("*.npy"))
    assert len(files) == 3
    for file in files:
        os.truncate(file, file.stat().st_size // 2)


def test_truncated_index_cache_is_rebuilt(corpus, folder, ranks):
    found, again = open_twice(corpus, folder)
    assert found == again
    cut_index_short(corpus)
    assert open_twice(corpus, folder) == [found] * 2
    cut_index_short(corpus)
    assert ranks(2, "test_data.open_twice", corpus=corpus, folder=folder) == [[found] * 2] * 2


def test_open_dataset_survives_a_new_one_of_the_same_part(corpus, tokenizer):
    first = open_samples(Corpus(corpus, tokenizer, S, 1), "train", 10, repeat=True)
    found = rows(first)
    open_samples(Corpus(corpus, tokenizer, S, 2), "train", 20, repeat=True)
    assert rows(first) == found


def test_samples_repeat_for_training_only(corpus, tokenizer):
    whole = windows(corpus / "train")
    assert len(
        open_samples(Corpus(corpus, tokenizer, S, 1), "train", 3 * len(whole), repeat=True)
    ) >= 3 * len(whole)
    held = len(windows(corpus / "valid"))
    assert set(rows(open_samples(Corpus(corpus, tokenizer, S, 1), "valid", held, repeat=False))) == set(
        windows(corpus / "valid")
    )
    with pytest.raises(
        InputError,
        match=rf"valid text has {held} samples of {S} tokens, {held + 1} are needed: "
        rf"lower evaluate\.num_samples to at most {held}",
    ):
        open_samples(Corpus(corpus, tokenizer, S, 1), "valid", held + 1, repeat=False)
    with pytest.raises(
        InputError, match=r"(?s)train text: .*train has \d+ tokens, one sample needs 100000 and a label"
    ):
        open_samples(Corpus(corpus, tokenizer, 100_000, 1), "train", 1, repeat=True)


def test_each_file_of_a_part_must_hold_a_sample(tmp_path, corpus, tokenizer):
    """Found before the stages that need it, and by them."""
    (tmp_path / "short.txt").write_text("one line\n")
    parts = {part: [f"{corpus}/{part}"] for part in PARTS} | {
        "valid": [f"{corpus}/valid", str(tmp_path / "short.txt")]
    }
    tokenize_corpus(DataConfig(**parts), tokenizer, tmp_path / "data", 1)
    assert too_short_problems(tmp_path / "data", "train", S, 0) == []
    (problem,) = too_short_problems(tmp_path / "data", "valid", S, 1)
    assert re.search(r"valid text: .*/data/valid has \d+ tokens, one sample needs", problem)
    with pytest.raises(InputError, match="one sample needs"):
        open_samples(Corpus(tmp_path / "data", tokenizer, S, 1), "valid", 1, repeat=False)


def test_order_depends_on_the_epochs_of_each_text_only(tmp_path, tokenizer, one_rank):
    """Two numbers of samples with equal epochs give equal orders, as far as both go. Others do not."""
    for name, lines in (("large", LINES[:200]), ("small", LINES[200:300])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    large, small = (str(tmp_path / f"{name}.jsonl") for name in ("large", "small"))
    for name, train in (("one", large), ("blend", {large: 3, small: 1})):
        data = DataConfig(calibration=small, train=train, valid=small, sequence_length=S)
        tokenize_corpus(data, tokenizer, tmp_path / name, 1)
        text = Corpus(tmp_path / name, tokenizer, S, 1, data=data)
        epoch = (tokens_of(prefixes_of(tmp_path / name, "train")[0])[0] - 1) // S
        orders: dict[str, list] = {}
        for num_samples in (epoch // 2, epoch - 3, epoch + 5, epoch + 9, 2 * epoch - 9, 2 * epoch + 5):
            order = rows(open_samples(text, "train", num_samples, repeat=True))[:num_samples]
            key = str(epochs_in_order(text, "train", num_samples))
            for known, other in orders.items():
                common = min(len(order), len(other))
                assert (order[:common] == other[:common]) == (key == known), (name, num_samples)
            orders[key] = max(orders.get(key, []), order, key=len)
        assert 2 <= len(orders) < 6


def test_prefixes_are_mixed_by_size(tmp_path, corpus, tokenizer, one_rank):
    both = [f"{corpus}/train", f"{corpus}/valid"]
    tokenize_corpus(DataConfig(calibration=both, train=both, valid=both), tokenizer, tmp_path / "mix", 1)
    large, small = windows(corpus / "train"), windows(corpus / "valid")
    held = large.total() + small.total()
    assert (
        Counter(rows(open_samples(Corpus(tmp_path / "mix", tokenizer, S, 1), "valid", held, repeat=False)))
        == large + small
    )
    dataset = open_samples(Corpus(tmp_path / "mix", tokenizer, S, 1), "train", held // 2, repeat=True)
    from_small = [row in small and row not in large for row in rows(dataset)]
    common = sum((large & small).values())
    assert len(from_small) <= held // 2 + 2
    assert small.total() // 2 - common <= sum(from_small) <= small.total() // 2 + 1
    assert (
        len(open_samples(Corpus(tmp_path / "mix", tokenizer, S, 1), "train", 3 * held, repeat=True))
        >= 3 * held
    )
    with pytest.raises(InputError, match=rf"has {held} samples"):
        open_samples(Corpus(tmp_path / "mix", tokenizer, S, 1), "valid", held + 1, repeat=False)


def test_megatron_data_as_source_is_split_by_document(tmp_path, tokenizer):
    """Every document goes to one part whole, and none is lost."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    def documents(prefix):
        dataset = IndexedDataset(str(prefix))
        return Counter(tuple(dataset[i].tolist()) for i in range(len(dataset)))

    text = tmp_path / "many.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES[:60]))
    tokenize_corpus(
        DataConfig(calibration=[str(text)], train=[str(text)], valid=[str(text)]),
        tokenizer,
        tmp_path / "whole",
        1,
    )
    counts = tokenize_corpus(
        DataConfig(source=str(tmp_path / "whole" / "train"), valid_fraction=0.2),
        tokenizer,
        tmp_path / "cut",
        1,
    )
    parts = [documents(tmp_path / "cut" / part) for part in ("calibration", "train", "valid")]
    assert sum(parts, Counter()) == documents(tmp_path / "whole" / "train")
    assert all(counts.values())


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_microbatches_cover_a_step_once_in_order(corpus, tokenizer, dp_size, micro_batch_size):
    dataset = open_samples(Corpus(corpus, tokenizer, S, 1), "train", 24, repeat=True)
    sizes = {"global_batch_size": 8, "micro_batch_size": micro_batch_size, "dp_size": dp_size}
    for step in (0, 2):
        ranks = [microbatches(dataset, step, dp_rank=rank, **sizes) for rank in range(dp_size)]
        in_order = [batch for m in zip(*ranks) for batch in m]
        for key, dtype in (
            ("tokens", torch.int64),
            ("labels", torch.int64),
            ("position_ids", torch.int64),
            ("loss_mask", torch.float32),
        ):
            assert all(
                batch[key].shape == (micro_batch_size, S) and batch[key].dtype == dtype for batch in in_order
            )
            assert torch.equal(
                torch.cat([batch[key] for batch in in_order]),
                torch.stack([dataset[i][key] for i in range(8 * step, 8 * step + 8)]),
            )


def test_microbatches_pad_beyond_the_limit(corpus, tokenizer):
    dataset = open_samples(Corpus(corpus, tokenizer, S, 1), "valid", 5, repeat=False)
    sizes = {"global_batch_size": 4, "micro_batch_size": 2, "dp_size": 2, "limit": 5}
    masks = [
        torch.cat([b["loss_mask"] for b in microbatches(dataset, 1, dp_rank=rank, **sizes)]).sum(1).tolist()
        for rank in range(2)
    ]
    assert masks == [[S, 0], [0, 0]]


def test_indivisible_batch_sizes_are_rejected():
    with pytest.raises(
        InputError,
        match=r"global_batch_size 10 must be a multiple of 4 "
        r"\(micro_batch_size 2 x data parallel size 2\); nearest 8",
    ):
        microbatches([], 0, global_batch_size=10, micro_batch_size=2, dp_rank=0, dp_size=2)
    with pytest.raises(InputError, match="nearest 4"):
        microbatches([], 0, global_batch_size=1, micro_batch_size=2, dp_rank=0, dp_size=2)
