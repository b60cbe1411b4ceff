"""Blends of Megatron data: exact shares, order, epochs, descriptors and start-up time."""

import json
import os
import resource
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from minitron_mp.config.data import DataConfig
from minitron_mp.config.recipe import Recipe, make_recipe
from minitron_mp.data.batches import Corpus, microbatches, open_samples
from minitron_mp.data.corpus import PARTS_FILE, texts_of, tokenize_corpus
from minitron_mp.data.tokenizer import Tokenizer
from minitron_mp.distributed.job import raise_open_file_limit
from minitron_mp.errors import InputError
from minitron_mp.workflow.stages import CACHE, CORRECT, DISTILL, EVALUATE, SCORE, TOKENIZE
from minitron_mp.workflow.teacher_stream import stream_settings

S = 8
NUM_SETS = 300


def encode(texts: list[str]) -> list[list[int]]:
    return [[ord(character) for character in text] for text in texts]


TOKENIZER = Tokenizer(encode, vocab_size=1000, eod=999)


def write_prefix(path: Path, number: int, num_samples: int) -> str:
    """Write Megatron data in which every token but the last of a document is `number`."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=DType.optimal_dtype(1000))
    documents = np.array_split(np.full(num_samples * S + 1, number), 3)
    for ids in documents:
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{path}.idx")
    return str(path)


def blend(folder: Path, shares: list[float | str], sizes: list[int], part: str = "train") -> Corpus:
    """Return the corpus of a recipe whose part is a blend of prefixes with so many samples."""
    folder.mkdir(exist_ok=True)
    prefixes = [write_prefix(folder / f"set{i}", i, size) for i, size in enumerate(sizes)]
    texts = {p: prefixes[:1] for p in ("calibration", "train", "valid")}
    data = DataConfig(**{**texts, part: dict(zip(prefixes, shares))}, sequence_length=S)
    tokenize_corpus(data, TOKENIZER, folder / "data", 1)
    return Corpus(folder / "data", TOKENIZER, S, 1, data=data)


def sets_in_order(corpus: Corpus, count: int, part: str = "train", *, repeat: bool = True) -> list[int]:
    """Return the number of the prefix of each of the first samples."""
    samples = open_samples(corpus, part, count, repeat=repeat)
    return [int(samples[i]["tokens"][0]) for i in range(count)]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([5, 20, 75], [50, 200, 750]),
        ([0.05, 0.2, 0.75], [50, 200, 750]),
        ([1, 1, 1], [1000 / 3] * 3),
        (["2 epochs", 1, 3], [80, 230, 690]),
        (["800 tokens", "2 epochs", 1], [100, 200, 700]),
        (["1.6K tokens", "2 epochs", "4.76K tokens"], [200 / 0.995, 200 / 0.995, 595 / 0.995]),
    ],
)
def test_shares_are_exact(tmp_path, one_rank, shares, expected):
    """Over the run, and over its first tenth, to one sample per text."""
    found = sets_in_order(blend(tmp_path, shares, [40, 100, 900]), 1000)
    counts, beginning = Counter(found), Counter(found[:100])
    for number, share in enumerate(expected):
        assert abs(counts[number] - share) < 1
        assert abs(beginning[number] - share / 10) <= 1


def test_prefixes_of_one_text_share_its_weight(tmp_path, one_rank):
    """In proportion to their sizes. A text has several prefixes if its tokens are in several files."""
    corpus = blend(tmp_path, [3, 1], [40, 100, 60])
    parts = json.loads((corpus.folder / PARTS_FILE).read_text())
    large = write_prefix(tmp_path / "more", 2, 300)
    parts["train"][1].append(large)
    (corpus.folder / PARTS_FILE).write_text(json.dumps(parts))
    counts = Counter(sets_in_order(corpus, 1600))
    assert [counts[number] for number in range(3)] == [1200, 100, 300]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (["50 epochs", 1], r"are 16,000 tokens, and the run has 800 \(100 samples\), so nothing is left"),
        (["2 epochs", "1 epochs"], r"give one text a weight, which takes the rest, or change the number"),
    ],
)
def test_budgets_that_do_not_fit_are_rejected(tmp_path, one_rank, shares, message):
    with pytest.raises(InputError, match=message):
        open_samples(blend(tmp_path, shares, [40, 100]), "train", 100, repeat=True)


@pytest.mark.parametrize("share", [0, -1, True, None, "0", "epochs", "2B epochs", "1..2 tokens", [1], "nan"])
def test_invalid_shares_are_rejected(share):
    with pytest.raises(ValueError, match="is not the share of a text; give a weight above 0"):
        DataConfig(calibration="a", valid="b", train={"c": share})


def test_names_that_look_like_numbers_stay_text():
    """A recipe in YAML has the text of each number. Shares are read as numbers, paths are not."""
    data = DataConfig(calibration="007", valid=["2024", "no"], train={"007": "3", "1e3": 0.5})
    assert (data.calibration, data.valid) == (["007"], ["2024", "no"])
    assert data.train == {"007": 3.0, "1e3": 0.5}


def test_shares_belong_to_the_stages_that_read_samples():
    """Not to the stage data. Epochs and tokens depend on the number of samples of distill."""
    values = {"model": "m", "output": "o", "distill": {"steps": 100, "global_batch_size": 4}}

    def settings(**texts: object) -> dict[str, dict[str, object]]:
        data = {"calibration": ["a"], "train": ["b"], "valid": ["c"], **texts}
        recipe = make_recipe(
            {
                **values,
                "data": data,
                "correct": {},
                "teacher": {"placement": "cached"},
                "transformer_impl": "local",
            }
        )
        stages = (TOKENIZE, CORRECT, SCORE, CACHE, DISTILL, EVALUATE)
        return {stage.name: stage.settings(recipe) for stage in stages}

    plain = settings()
    for part, names in (
        ("train", {"correct", "cache", "distill"}),
        ("calibration", {"score"}),
        ("valid", {"evaluate"}),
    ):
        changed = settings(**{part: {"b": 3, "d": 1}})
        assert {name for name in plain if changed[name] != plain[name]} == names
        for name in names:
            assert changed[name] == {**plain[name], f"{part} shares": [3.0, 1.0]}
    masked = settings(eod_mask_loss=True)
    assert {name for name in plain if masked[name] != plain[name]} == {"correct", "distill", "evaluate"}
    masked = settings(document_mask=True)
    assert {name for name in plain if masked[name] == plain[name]} == {"data"}
    budget = settings(train={"b": "2 epochs", "d": 1})["correct"]
    assert (budget["train shares"], budget["samples of distill"]) == (["2 epochs", 1.0], 400)


def test_shares_of_the_held_out_text_belong_to_runs_that_validate():
    """To the result of a run with patience, and to the agreement with a remote teacher."""

    def recipe(*, share: int, **distill: int) -> Recipe:
        data = {"calibration": ["a"], "train": ["b"], "valid": {"c": share, "d": 1}}
        return make_recipe({"model": "m", "output": "o", "data": data, "distill": distill})

    patient = {"valid_interval": 50, "patience": 2}
    assert DISTILL.settings(recipe(share=3, **patient)) != DISTILL.settings(recipe(share=2, **patient))
    assert "valid shares" not in DISTILL.settings(recipe(share=3, valid_interval=50))
    link: Any = SimpleNamespace(teacher="", shape=SimpleNamespace(), window=1)
    arch: Any = SimpleNamespace(hidden_size=1, vocab_size=1, padded_vocab_size=1)
    for distill, expected in (({"valid_interval": 50}, [3.0, 1.0]), ({}, None)):
        agreed = stream_settings(
            recipe(share=3, **distill), link, arch, vocab_size=1, fingerprints={}, tokenizer={}
        )
        assert agreed.get("valid shares") == expected


def test_end_of_document_can_be_left_out_of_the_loss(tmp_path, one_rank):
    """The loss of a position whose token is eod would be that of the next document's first token."""
    (tmp_path / "text.jsonl").write_text('{"text": "abcdefghij"}\n' * 50)
    data = {part: [str(tmp_path / "text.jsonl")] for part in ("calibration", "train", "valid")}
    masks = []
    for eod_mask_loss in (False, True):
        config = DataConfig(**data, sequence_length=S, eod_mask_loss=eod_mask_loss)
        tokenize_corpus(config, TOKENIZER, tmp_path / "data", 1)
        samples = open_samples(
            Corpus(tmp_path / "data", TOKENIZER, S, 1, data=config), "train", 40, repeat=True
        )
        for sample in (samples[i] for i in range(40)):
            is_end = sample["tokens"] == TOKENIZER.eod
            assert sample["loss_mask"].tolist() == (~is_end if eod_mask_loss else is_end | True).tolist()
            masks.append(sample["loss_mask"].sum())
    assert sum(masks[40:]) < sum(masks[:40]) == 40 * S


def test_documents_of_a_sample_are_numbered(tmp_path, one_rank):
    (tmp_path / "text.jsonl").write_text('{"text": "abcde"}\n' * 50)
    texts = {part: [str(tmp_path / "text.jsonl")] for part in ("calibration", "train", "valid")}
    data = DataConfig(**texts, sequence_length=S, document_mask=True)
    tokenize_corpus(data, TOKENIZER, tmp_path / "data", 1)
    samples = open_samples(Corpus(tmp_path / "data", TOKENIZER, S, 1, data=data), "train", 8, repeat=True)
    sizes = {"global_batch_size": 8, "micro_batch_size": 4, "dp_rank": 0, "dp_size": 1}
    for batch in microbatches(samples, 0, **sizes):
        for tokens, documents in zip(batch["tokens"].tolist(), batch["documents"].tolist()):
            ends = [0, *(int(token == TOKENIZER.eod) for token in tokens[:-1])]
            assert documents == np.cumsum(ends).tolist()


def test_held_out_blend_never_repeats(tmp_path, one_rank):
    corpus = blend(tmp_path, [1, 1], [20, 60], part="valid")
    samples = sets_in_order(corpus, 40, "valid", repeat=False)
    assert Counter(samples) == {0: 20, 1: 20}
    with pytest.raises(InputError, match=r"set0 has 20 samples of 8 tokens, its share of 60 samples is 30"):
        open_samples(corpus, "valid", 60, repeat=False)


def test_files_are_texts_of_a_blend(tmp_path, one_rank):
    """Each text has its own tokens, and a file may not be in two texts."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name * 50}"}}\n' * 20)
    data = DataConfig(
        calibration=[str(tmp_path / "a.jsonl")],
        valid=[str(tmp_path / "b.jsonl")],
        train={str(tmp_path / "a.jsonl"): 1, str(tmp_path / "b.jsonl"): 3},
        sequence_length=S,
    )
    tokens = tokenize_corpus(data, TOKENIZER, tmp_path / "data", 1)
    assert tokens == {"calibration": 1020, "train": 2040, "valid": 1020}
    assert [Path(prefix).name for (prefix,) in texts_of(tmp_path / "data", "train")] == ["train_0", "train_1"]
    samples = open_samples(Corpus(tmp_path / "data", TOKENIZER, S, 1, data=data), "train", 100, repeat=True)
    first = Counter(chr(int(samples[i]["tokens"].mode().values)) for i in range(100))
    assert first == {"a": 25, "b": 75}
    both = DataConfig(calibration="a", valid="b", train={str(tmp_path): 1, str(tmp_path / "a.jsonl"): 1})
    with pytest.raises(InputError, match=r"data.train: two texts of the blend have .*a.jsonl; give each"):
        tokenize_corpus(both, TOKENIZER, tmp_path / "both", 1)


def order_on_rank(corpus: Corpus, count: int) -> tuple[list[int], list[list[int]]]:
    samples = open_samples(corpus, "train", count, repeat=True)
    sizes = {"global_batch_size": 8, "micro_batch_size": 2}
    batches = microbatches(samples, 3, dp_rank=dist.get_rank(), dp_size=2, **sizes)
    return sets_in_order(corpus, count), [batch["tokens"][:, 0].tolist() for batch in batches]


def test_order_does_not_depend_on_the_ranks(tmp_path, ranks):
    """All ranks read the same samples, and rank m % 2 has microbatch m."""
    corpus = blend(tmp_path, [1, 2], [40, 100])
    (first, even), (second, odd) = ranks(2, "test_blend.order_on_rank", corpus=corpus, count=64)
    assert first == second
    in_order = [number for pair in zip(even, odd) for rows in pair for number in rows]
    assert in_order == first[24:32]


def many_sets(corpus: Corpus) -> tuple[int, int]:
    """On a rank under `ulimit -n 1024`: open all prefixes; return new descriptors and texts read."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        before = len(os.listdir("/proc/self/fd"))
        samples = open_samples(corpus, "train", 2 * NUM_SETS, repeat=True)
        texts = {int(samples[i]["tokens"][0]) for i in range(2 * NUM_SETS)}
        return len(os.listdir("/proc/self/fd")) - before, len(texts)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_300_prefixes_open_no_descriptors(tmp_path, ranks):
    """Two for the order of the blend; benchmarks/prefixes.py measures the time."""
    corpus = blend(tmp_path, [1.0] * NUM_SETS, [20] * NUM_SETS)
    for descriptors, texts in ranks(2, "test_blend.many_sets", corpus=corpus):
        assert descriptors <= 2
        assert texts == NUM_SETS


def test_soft_limit_of_open_files_is_raised():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
    try:
        raise_open_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_held_out_parts_have_a_size_in_tokens(tmp_path, one_rank):
    """No document is lost, in two parts, or divided. The choice depends on the seed alone."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    lines = [json.dumps({"text": chr(300 + i) * (1 + i % 50)}) for i in range(500)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    data = {"source": str(tmp_path / "text.jsonl"), "valid_fraction": 0.2, "sequence_length": S}

    def documents(name: str, **values: int) -> dict[str, list[tuple[int, ...]]]:
        folder = tmp_path / name
        tokenize_corpus(DataConfig(**data, **values), TOKENIZER, folder, 7)
        found = {}
        for part in ("calibration", "train", "valid"):
            datasets = [IndexedDataset(prefix) for prefix in texts_of(folder, part)[0]]
            found[part] = [tuple(d[i].tolist()) for d in datasets for i in range(len(d))]
        return found

    whole, limited = documents("whole"), documents("limited", valid_tokens=300)
    assert limited == documents("again", valid_tokens=300)
    for part in ("calibration", "valid"):
        sizes = [len(ids) for ids in limited[part]]
        assert 300 <= sum(sizes) < 300 + 52
        assert set(limited[part]) < set(whole[part])
    assert sorted(chain(*limited.values())) == sorted(chain(*whole.values()))
    # The surplus is no text of its own: it may be shorter than a sample.
    assert [Path(prefix).name for prefix in texts_of(tmp_path / "limited", "train")[0]] == ["train"]
    assert not list((tmp_path / "limited").glob("surplus*"))
    samples = open_samples(Corpus(tmp_path / "limited", TOKENIZER, S, 1), "train", 400, repeat=True)
    assert len(samples) >= 400
    with pytest.raises(InputError, match=r"calibration part has .* tokens, and data.valid_tokens is 90,000"):
        documents("large", valid_tokens=90_000)
