"""Shards of a text: division, workers, restart, and the hashes of its files."""

import gzip
import json
import os
import signal
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
from tiny import make_tokenizer, sentences

from minitron_mp.artifacts.files import hash_content
from minitron_mp.artifacts.output_lock import locked
from minitron_mp.config.data import DataConfig
from minitron_mp.data import file_hashes, shards, workers
from minitron_mp.data.corpus import finish_corpus, open_text_of, tokenize_corpus
from minitron_mp.data.file_hashes import FileHashes
from minitron_mp.data.indexed_files import DatasetWriter, concatenate, ids_dtype, lengths_of
from minitron_mp.data.shards import ShardStore, Share, divide, parse_share
from minitron_mp.data.sources import TextFile, corpus_fingerprint
from minitron_mp.data.tokenizer import load_tokenizer
from minitron_mp.errors import InputError

SMALL = 3000
"""Bytes of a shard in these tests."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", SMALL)


def make_texts(folder, tokenizer):
    """Text files of several kinds, and Megatron data. Returns the entries of data.source."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for number in range(8):
        records = "".join(json.dumps({"text": line}) + "\n" for line in sentences(30, seed=number))
        (texts / f"{number}.jsonl").write_text(records + '{"text": " "}\n')
    (texts / "packed.txt.gz").write_bytes(gzip.compress("".join(sentences(40, seed=50)).encode()))
    (texts / "empty.txt").touch()
    writer = DatasetWriter(folder / "tokenized", ids_dtype(tokenizer.vocab_size))
    for line in sentences(200, seed=60):
        writer.add(np.array([*tokenizer.encode([line])[0], tokenizer.eod]))
    writer.close()
    return [str(texts), str(folder / "tokenized")]


def open_shards(folder, data, tokenizer):
    """Return text, store and shards of a recipe whose output is a folder."""
    folder.mkdir(exist_ok=True)
    text = open_text_of(data, tokenizer, 1, output=folder)
    return text, ShardStore(folder / "shards" / "data", text.job, "a tokenizer"), divide(text.files)


def missing(folder, store, divided):
    hashes = FileHashes(folder)
    return [shard.number for shard in divided if not store.is_done(shard, hashes)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("entries", [slice(None), slice(1)], ids=["with Megatron data", "text"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_shards_and_workers_do_not_change_the_result(tmp_path, tokenizer, num_workers, entries):
    data = DataConfig(source=make_texts(tmp_path, tokenizer)[entries], valid_fraction=0.1)
    counts = tokenize_corpus(data, tokenizer, tmp_path / "whole", 1)

    text, store, divided = open_shards(tmp_path / "out", data, tokenizer)
    assert len(divided) > 3
    done = []
    workers.make_shards(store, divided, num_workers, done.append)
    assert missing(tmp_path / "out", store, divided) == []
    (tmp_path / "merged").mkdir()
    written = store.put_together(divided, tmp_path / "merged")
    assert finish_corpus(text, written, tmp_path / "merged") == counts
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    if entries == slice(1):
        assert sum(done) == written.num_documents
    store.discard()
    assert not (tmp_path / "out" / "shards").exists()


def test_few_documents_are_cut_alike_in_shards(tmp_path, tokenizer):
    """The sizes of pieces follow from the complete source, not from a shard."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text("\n".join(sentences(900, seed=number)))
    data = DataConfig(source=str(texts))
    tokenize_corpus(data, tokenizer, tmp_path / "whole", 1)
    text, store, divided = open_shards(tmp_path / "out", data, tokenizer)
    assert len(divided) == 4
    workers.make_shards(store, divided, 1)
    (tmp_path / "merged").mkdir()
    finish_corpus(text, store.put_together(divided, tmp_path / "merged"), tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


@pytest.mark.parametrize("vocab_size", [300, 70000])
def test_files_are_those_of_megatron(tmp_path, vocab_size):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    chance = np.random.default_rng(0)
    documents = [chance.integers(0, 300, size) for size in chance.integers(1, 50, 20)]
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=DType.optimal_dtype(vocab_size))
    writers = [DatasetWriter(tmp_path / name, ids_dtype(vocab_size)) for name in ("b", "c1", "c2")]
    for number, ids in enumerate(documents):
        builder.add_document(ids, [len(ids)])
        writers[0].add(ids)
        writers[1 + (number >= 7)].add(ids)
    builder.finalize(str(tmp_path / "a.idx"))
    for writer in writers:
        writer.close()
    concatenate([tmp_path / "c1", tmp_path / "c2"], tmp_path / "d", ids_dtype(vocab_size))
    for suffix in ("bin", "idx"):
        expected = (tmp_path / f"a.{suffix}").read_bytes()
        assert (tmp_path / f"b.{suffix}").read_bytes() == expected
        assert (tmp_path / f"d.{suffix}").read_bytes() == expected
    assert lengths_of(tmp_path / "d").tolist() == [len(ids) for ids in documents]


def test_only_changed_and_damaged_shards_are_made_again(tmp_path, tokenizer):
    data = DataConfig(source=make_texts(tmp_path, tokenizer)[:1], valid_fraction=0.1)
    out = tmp_path / "out"
    _, store, divided = open_shards(out, data, tokenizer)
    assert missing(out, store, divided) == list(range(len(divided)))
    workers.make_shards(store, divided, 1)
    assert missing(out, store, divided) == []

    changed = divided[1].files[0].path
    changed.write_text(changed.read_text().replace("the", "eht", 1))
    assert missing(out, store, divided) == [1]
    part = next((store.folder / divided[2].name).glob("*.bin"))
    part.write_bytes(part.read_bytes()[:-2])
    (store.folder / divided[0].name / "shard.json").unlink()
    assert missing(out, store, divided) == [0, 1, 2]

    other_tokenizer = replace(store, tokenizer_hash="another")
    assert missing(out, other_tokenizer, divided) == list(range(len(divided)))
    settings = replace(store.job.settings, seed=2)
    other_seed = replace(store, job=replace(store.job, settings=settings))
    assert missing(out, other_seed, divided) == list(range(len(divided)))


def test_killed_worker_loses_its_shard_only(tmp_path, tokenizer, monkeypatch):
    data = DataConfig(source=make_texts(tmp_path, tokenizer)[:1], valid_fraction=0.1)
    out = tmp_path / "out"
    _, store, divided = open_shards(out, data, tokenizer)
    started = []

    class Recorded(workers._Worker):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self)

        def give(self, shard):
            if shard.number == 3:
                self.process.kill()
                self.process.wait()
                self.shard = shard
                return
            super().give(shard)

    monkeypatch.setattr(workers, "_Worker", Recorded)
    with pytest.raises(InputError, match=r"killed in shard 00003 \(signal 9\).*lower data.workers"):
        workers.make_shards(store, divided, 2)
    assert all(worker.process.poll() is not None for worker in started)
    left = missing(out, store, divided)
    assert 3 in left
    assert 0 not in left or 1 not in left
    monkeypatch.undo()
    monkeypatch.setattr(shards, "SHARD_BYTES", SMALL)
    workers.make_shards(store, [divided[number] for number in left], 2)
    assert missing(out, store, divided) == []


def test_error_of_a_worker_is_reported(tmp_path, tokenizer):
    data = DataConfig(source=make_texts(tmp_path, tokenizer)[:1], valid_fraction=0.1)
    _, store, divided = open_shards(tmp_path / "out", data, tokenizer)
    divided[1].files[0].path.write_text('{"text": "a"}\nno record\n')
    with pytest.raises(InputError, match=r"\.jsonl line 2 is not a JSON object"):
        workers.make_shards(store, divided, 2)
    assert [path.name for path in store.folder.iterdir() if path.name.startswith(".0")] == []


def test_workers_end_with_their_parent(tmp_path, tokenizer):
    data = DataConfig(source=make_texts(tmp_path, tokenizer)[:1], valid_fraction=0.1)
    _, store, divided = open_shards(tmp_path / "out", data, tokenizer)
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:  # it is killed while its workers run

        def report(documents):
            os.write(writing, b"x")
            time.sleep(60)

        try:
            workers.make_shards(store, divided, 2, report)
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    children = psutil.Process(parent).children()
    assert len(children) == 2
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert psutil.wait_procs(children, timeout=60)[1] == []
    workers.make_shards(store, divided, 1)  # the locks of dead processes are removed
    assert missing(tmp_path / "out", store, divided) == []


def test_shard_that_another_process_makes_is_refused(tmp_path, tokenizer):
    data = DataConfig(source=make_texts(tmp_path, tokenizer)[:1], valid_fraction=0.1)
    _, store, divided = open_shards(tmp_path / "out", data, tokenizer)
    store.folder.mkdir(parents=True)
    with (
        locked(store.folder, ".00000.lock"),
        pytest.raises(InputError, match=r"shards/data/00000 is in use: process \d+ on .*\.00000\.lock"),
    ):
        store.make(divided[0])


def test_file_that_changes_while_its_shard_is_made_is_rejected(tmp_path, tokenizer):
    data = DataConfig(source=make_texts(tmp_path, tokenizer)[:1], valid_fraction=0.1)
    _, store, divided = open_shards(tmp_path / "out", data, tokenizer)
    path = divided[0].files[0].path
    with pytest.raises(InputError, match="changed while it was read"):
        store.make(divided[0], lambda documents: os.utime(path, ns=(1, 1)))
    assert list(store.folder.iterdir()) == []


def test_shards_follow_from_the_text_alone(tmp_path):
    files = []
    for number in range(50):
        path = tmp_path / f"{number}.txt"
        path.write_text("x" * (100 * number))
        files.append(TextFile("source", path.name, path))
    divided = divide(files)
    assert [file for shard in divided for file in shard.files] == files
    assert [shard.number for shard in divided] == list(range(len(divided)))
    sizes = [sum(path.stat().st_size for path in shard.paths) for shard in divided]
    assert all(SMALL <= size < SMALL + 5000 for size in sizes[:-1])
    shares = [Share(number, 4).of(divided) for number in (1, 2, 3, 4)]
    assert sorted(shard.number for share in shares for shard in share) == list(range(len(divided)))
    assert divide([]) == []


def test_packed_files_count_as_more_text(tmp_path):
    for name in ("a.txt", "b.txt.gz"):
        (tmp_path / name).write_bytes(b"x" * (SMALL // 2))
    plain, packed = (TextFile("source", path.name, path) for path in sorted(tmp_path.iterdir()))
    assert len(divide([plain] * 4)) == 2
    assert len(divide([packed] * 4)) == 4


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/", "/4", "a/b", "1/4/2", "-1/4", "1/0", "²/4"])
def test_invalid_shares_are_rejected(text):
    with pytest.raises(InputError, match=r"--shard is .*; give NUMBER/COUNT"):
        parse_share(text)
    assert str(parse_share("3/16")) == "3/16"


def make_old(path):
    """Let a file look as if it was written an hour ago, as far as a process can."""
    past = time.time_ns() - 3600 * 10**9
    os.utime(path, ns=(past, past))


@pytest.fixture
def settled(monkeypatch):
    """A file is at rest as soon as it is written."""
    monkeypatch.setattr(file_hashes, "SETTLED_NS", -(10**12))


def test_second_start_reads_only_what_changed(tmp_path, settled):
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    out.mkdir()
    for number in range(5):
        (texts / f"{number}.txt").write_text(f"text {number}")
    paths = sorted(texts.iterdir())
    data = DataConfig(source=str(texts))
    with locked(out):
        first = corpus_fingerprint(data, output=out)
    saved = FileHashes(out)
    assert [each.digest for each in saved.hashes_of(paths)] == [hash_content(path) for path in paths]
    assert saved.num_read == 0
    assert corpus_fingerprint(data, output=out) == first == corpus_fingerprint(data)

    paths[2].write_text("TEXT 2")
    again = FileHashes(out)
    again.hashes_of(paths)
    assert again.num_read == 1
    assert corpus_fingerprint(data, output=out) == corpus_fingerprint(data) != first
    assert FileHashes(out).known.keys() == saved.known.keys()  # no lock: nothing was written
    assert FileHashes(out).known != again.known


def test_change_that_keeps_size_and_times_is_seen(tmp_path):
    """The time of change cannot be set, and a young file is always read again."""
    (tmp_path / "out").mkdir()
    path = tmp_path / "a.txt"
    path.write_text("old")
    make_old(path)
    hashes = FileHashes(tmp_path / "out")
    hashes.hashes_of([path])
    hashes.hashes_of([path])
    assert hashes.num_read == 2
    assert hashes.known == {}
    before = path.stat()
    path.write_text("new")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashes.hashes_of([path])[0].digest == hash_content(path)


def test_time_of_change_counts(tmp_path, settled):
    path = tmp_path / "a.txt"
    path.write_text("old")
    hashes = FileHashes()
    hashes.hashes_of([path])
    before = path.stat()
    time.sleep(0.05)  # above the resolution of the times
    path.write_text("new")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert hashes.hashes_of([path])[0].digest == hash_content(path)


@pytest.mark.parametrize("content", ["", "{", "[[1, 2]]", '{"a": 1}', "[null, 3]", '[["a", 1, 2, 3, "b"]]'])
def test_damaged_hashes_are_ignored(tmp_path, content):
    (tmp_path / file_hashes.HASHES_FILE).write_text(content)
    path = tmp_path / "a.txt"
    path.write_text("text")
    hashes = FileHashes(tmp_path)
    assert hashes.hashes_of([path])[0].digest == hash_content(path)
    assert hashes.num_read == 1


def test_shards_remember_the_hashes_of_their_files(tmp_path, tokenizer, settled):
    data = DataConfig(source=make_texts(tmp_path, tokenizer)[:1], valid_fraction=0.1)
    out = tmp_path / "out"
    _, store, divided = open_shards(out, data, tokenizer)
    workers.make_shards(store, divided, 1)
    hashes = FileHashes(out)
    assert all(store.is_done(shard, hashes) for shard in divided)
    assert hashes.num_read == 0
