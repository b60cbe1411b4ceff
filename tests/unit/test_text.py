"""Reading of text: every format, encoding and layout of folders that people bring."""

import bz2
import gzip
import inspect
import json
import lzma
import os
import shutil
import socket
import sys
import tracemalloc

import pytest

from minitron_mp.config.data import DataConfig
from minitron_mp.config.recipe import load_recipe
from minitron_mp.data import checks, documents, records, text_files, unused
from minitron_mp.data.checks import corpus_problems
from minitron_mp.data.documents import TextSettings, read_documents, read_pieces
from minitron_mp.data.record_fields import Fields
from minitron_mp.data.sources import corpus_fingerprint, fields_of, find_sources, unused_text
from minitron_mp.data.text_files import open_text
from minitron_mp.data.unused import UnusedText
from minitron_mp.errors import InputError

ROWS = [{"text": f"record {i} with a few words", "id": i, "meta": {"raw": f"raw {i}"}} for i in range(6)]
TEXTS = [row["text"] for row in ROWS]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(source, *, output=None, **settings):
    """Return the documents of a source, and the counts of the text that is not used as it is."""
    data = DataConfig(source=str(source), **settings)
    sources = find_sources(data, output=output)
    not_used = unused_text(sources)
    settings = TextSettings(0.03, 1, fields_of(data))
    found = [document.text for document in read_documents(sources, settings, not_used)]
    return found, {reason: tally.count for reason, tally in not_used.tallies.items()}


def names_of(source, output=None):
    return [name for name, _ in find_sources(DataConfig(source=str(source)), output=output)["source"].files]


def zstd(content):
    pyarrow = pytest.importorskip("pyarrow")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("packing", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.ndjson", JSONL),
        ("a.JSONL", JSONL),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", JSONL),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
    ],
)
def test_packed_and_unpacked_records_are_equal(tmp_path, monkeypatch, packing, name, content):
    monkeypatch.setattr(records, "CHUNK_CHARACTERS", 37)
    packed = {"": bytes, ".zst": zstd, **PACK}[packing](content.encode())
    path = write(tmp_path / (name + packing), packed)
    assert read(path) == (TEXTS, {})
    assert read(tmp_path) == (TEXTS, {})
    assert names_of(tmp_path) == [name]  # a text belongs to the same part, packed or not


def test_joined_packed_files_are_read_whole(tmp_path):
    first, second = (JSONL[: len(JSONL) // 2], JSONL[len(JSONL) // 2 :])
    for suffix, pack in {**PACK, ".zst": zstd}.items():
        path = write(tmp_path / f"a.jsonl{suffix}", pack(first.encode()) + pack(second.encode()))
        assert read(path) == (TEXTS, {})


@pytest.mark.parametrize("packed_bytes", [1, 70, 1 << 15])
def test_no_text_after_the_first_stream_is_ignored(tmp_path, monkeypatch, packed_bytes):
    """xz allows NUL bytes between streams. Other bytes between or after streams are damage."""
    monkeypatch.setattr(text_files, "PACKED_BYTES", packed_bytes)
    first, second = (JSONL[: len(JSONL) // 2].encode(), JSONL[len(JSONL) // 2 :].encode())
    for suffix in (".bz2", ".xz"):
        pack, path = PACK[suffix], tmp_path / f"a.jsonl{suffix}"
        assert read(write(path, pack(first) + pack(second) + bytes(200))) == (TEXTS, {})
        invalid = [pack(first) + b"\1\2\3\4" + pack(second), pack(first) + bytes(8) + pack(second)[:-3]]
        invalid += [pack(JSONL.encode()) + b"rest", pack(first) + bytes(4) + b"\1" + pack(second)]
        if suffix == ".bz2":
            invalid.append(pack(first) + bytes(4) + pack(second))
        else:
            padded = pack(first) + bytes(8) + pack(b"") + bytes(120) + pack(second)
            assert read(write(path, padded)) == (TEXTS, {})
        for content in invalid:
            with pytest.raises(InputError, match=r"is damaged or cut off .*; create or copy it again"):
                read(write(path, content))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_bytes_between_packed_streams_are_damage(tmp_path, suffix):
    pack = gzip.compress if suffix == ".gz" else zstd
    path = write(tmp_path / f"a.jsonl{suffix}", pack(JSONL.encode()) + b"\1\2\3\4" + pack(JSONL.encode()))
    with pytest.raises(InputError, match="is damaged or cut off"):
        read(path)


def test_few_packed_documents_are_cut_like_unpacked_ones(tmp_path):
    text = "".join(f"line {i} of a book\n" + "\n" * (i % 5 == 4) for i in range(4000))
    plain = read(write(tmp_path / "plain" / "book.txt", text))
    assert len(plain[0]) > 10
    assert read(write(tmp_path / "packed" / "book.txt.gz", gzip.compress(text.encode(), mtime=0))) == plain


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read(tmp_path) == (TEXTS, {})
    assert read(tmp_path, text_field="meta.raw")[0] == [f"raw {i}" for i in range(6)]
    for field, message in (
        ("content", r'has no field "content" \(its fields: text, id, meta\)'),
        ("id", r'a\.parquet row 1 has a number in the field "id"'),
        ("meta", "has an object in the field"),
    ):
        with pytest.raises(InputError, match=message):
            read(tmp_path, text_field=field)
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r'a\.parquet row 2 has null in the field "text"'):
        read(tmp_path)
    for kind in (pyarrow.binary(), pyarrow.large_binary()):
        column = pyarrow.array([b"caf\xc3\xa9", b"b"], kind)
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        assert read(tmp_path) == (["caf\u00e9", "b"], {})
    parquet.write_table(pyarrow.table({"text": [b"a", b"caf\xe9"]}), tmp_path / "a.parquet")
    with pytest.raises(
        InputError, match=r'a\.parquet row 2 has bytes in the field "text" that are not UTF-8: byte 0xe9 at'
    ):
        read(tmp_path)
    write(tmp_path / "a.parquet", b"PAR1" + bytes(500) + b"PAR1")
    with pytest.raises(InputError, match=r"a\.parquet cannot be read as a parquet file"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_missing_pyarrow_is_named_before_a_run(tmp_path, monkeypatch, name):
    write(tmp_path / "text" / name, b"content")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (problem,) = corpus_problems(DataConfig(source=str(tmp_path / "text")), tmp_path / "out", None)
    assert name in problem
    assert "pip install minitron-mp[formats]" in problem


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_marked_encodings_and_line_ends(tmp_path, encoding, end, pack):
    suffix = ".gz" if pack is gzip.compress else ""
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    rows = [{"text": f"fl\u00fc\u00df {i} \u4e2d\u6587"} for i in range(3)]
    content = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    path = write(tmp_path / f"a.jsonl{suffix}", pack(mark + content.encode(encoding)))
    assert read(path) == ([row["text"] for row in rows], {})
    path = write(tmp_path / f"a.txt{suffix}", pack(mark + f"one{end}\u4e2d{end}".encode(encoding)))
    assert read(path) == (["one\n\u4e2d\n"], {})


@pytest.mark.parametrize("joint", ["", "\x85", "\u2028", "\n\ufeff", "\r\n\ufeff", " "])
def test_records_without_a_line_end_between_them(tmp_path, joint):
    """Files that were joined without a line end, with the mark of the second, or with other line ends."""
    path = write(tmp_path / "a.jsonl", joint.join(json.dumps(row) for row in ROWS))
    assert read(path) == (TEXTS, {})


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_numbers_of_many_digits_are_read(tmp_path, name):
    """Python limits int() to 4,300 digits."""
    digits = "9" * 5000
    path = write(tmp_path / name, f'{{"n": {digits}, "text": "a"}}\n{{"n": -{digits}, "text": "b"}}\n')
    assert read(path) == (["a", "b"], {})
    write(path, f'{{"text": {digits}}}')
    with pytest.raises(InputError, match=r'line 1 has a number in the field "text"'):
        read(path)


def test_line_separators_in_a_text_do_not_end_a_record(tmp_path):
    text = "one\u2028two\x85three\x0bfour\r\nfive"
    path = write(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n")
    assert read(path) == ([text], {})


def test_surrogates_and_nul_characters_are_counted(tmp_path):
    texts = ["half \ud83d a pair", "\ude00", "whole \U0001f600", "a \0 b", "a\ud83d\ud83d\ude00"]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    expected = ["half \ufffd a pair", "\ufffd", "whole \U0001f600", "a \0 b", "a\ufffd\U0001f600"]
    assert read(path) == (expected, {unused.SURROGATE: 3, unused.NUL: 1})
    path = write(tmp_path / "a.txt", "some text with one \0 among many other characters\n")
    assert read(path)[1] == {unused.NUL: 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo caf\xe9 x\n", r"not UTF-8 text: line 2, byte 0xe9 at offset 11 \(invalid"),
        ("a.jsonl", JSONL.encode() + b'{"text": "\xff"}', r"not UTF-8 text: line 7, byte 0xff at offset \d+"),
        (
            "a.jsonl.gz",
            gzip.compress(b"\r\n\xc3", mtime=0),
            r"line 2, byte 0xc3 at offset 2 \(unexpected end of data",
        ),
        ("a.txt", b"\xef\xbb\xbfab\n\x80", r"line 2, byte 0x80 at offset 6"),
        (
            "a.txt",
            "ab\n\ud800c".encode("utf-16", "surrogatepass"),
            r"not UTF-16-LE text: line 2, .* offset 8",
        ),
        ("a.txt", b"x" * 3_000_000 + b"\n\xff", r"line 2, byte 0xff at offset 3,000,001"),
        ("a.txt", "text".encode("utf-16-le"), "seems to be UTF-16LE without a byte order mark; convert it"),
        ("a.txt", "text".encode("utf-16-be"), "seems to be UTF-16BE without a byte order mark; convert it"),
        ("a.txt", bytes(5000), r"begins with 4,096 NUL bytes"),
        ("a.txt", gzip.compress(b"text", mtime=0), r"is not text but gzip data: add \.gz"),
        ("a.jsonl", b"PAR1\x15\x00\xff", r"is not text but a parquet file"),
        ("a.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "a PDF document: convert it"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "git-lfs pointer, not the file itself; run",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(JSONL.encode(), mtime=0)[:-12],
            r"damaged or cut off \(Compressed file ended",
        ),
        ("a.jsonl.gz", JSONL, r"not gzip data; if it is already unpacked, remove \.gz from its name"),
        ("a.jsonl.bz2", JSONL, r"not bzip2 data; .* remove \.bz2 from its name"),
        ("a.txt.XZ", "text", r"not xz data; .* remove \.XZ from its name"),
        ("a.json.zst", json.dumps(ROWS), r"not zstd data; .* remove \.zst from its name"),
        ("a.txt.gz", b"\x1f", r"damaged or cut off"),
        ("a.txt.gz", b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer"),
        ("a.txt.bz2", bz2.compress(b"text")[:-4], r"damaged or cut off"),
        ("a.jsonl.xz", lzma.compress(JSONL.encode())[:-20], r"damaged or cut off"),
    ],
)
def test_invalid_bytes_are_named_with_their_place(tmp_path, name, content, message):
    write(tmp_path / name, content)
    with pytest.raises(InputError, match=rf"{name} .*{message}"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": null}', r'line 7 has null in the field "text"'),
        (
            '{"text": ["a"]}',
            r'line 7 has a list in the field "text", not a string; join its strings into one',
        ),
        ('{"text": {"a": 1}}', r'line 7 has an object in the field "text"'),
        ('{"content": "x", "m": {"a": 1}}', r"\(its fields: content, m\.a\); set data\.text_field"),
        ('{"messages": [{"role": "user"}]}', r"\(its fields: messages\)"),
        ("{}", r"\(its fields: none\)"),
        (
            '[{"text": "a"}]',
            r"line 7 is not a JSON object but a list; name the file \.json if it",
        ),
        ('["text"]', r'line 7 is not a JSON object but a list; write each text as {"text": "\.\.\."}'),
        ('"text"', r'line 7 is not a JSON object but a string; write each text as {"text": "\.\.\."}'),
        ("[1, 2]", "line 7 is not a JSON object but a list; correct or delete it"),
        ("null", "line 7 is not a JSON object but null"),
        ("true", "line 7 is not a JSON object but a truth value"),
        ('{"text": "cut', r"line 7 is not a JSON object: .*Unterminated string"),
        ("[" * 5000, "line 7 is not a JSON object: .*recursion"),
        ("[", r"write one record on each line, or name the file \.json"),
        ('{"text": "raw \t tab"}', "line 7 is not a JSON object: .*Invalid control character"),
    ],
)
def test_records_without_text_are_named_with_their_line(tmp_path, line, message):
    write(tmp_path / "a.jsonl", JSONL + line + "\n")
    with pytest.raises(InputError, match=rf"a\.jsonl .*{message}|a\.jsonl {message}"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"text": "a"},\n{"text": tru}]', r"a\.json line 3 is not a JSON object"),
        ('[{"text": "a"}, 3]', r"a\.json line 1 is not a JSON object but a number"),
        (
            '{"id": "x", "data": [{"text": "a"}]}',
            r'its fields: id, data\); set data\.text_field .*, or write the objects of "data" as records, or',
        ),
        ('["a", "b"]', r'line 1 is not a JSON object but a string; write each text as {"text": "\.\.\."}'),
        ('[[{"text": "a"}]]', r"line 1 is not a JSON object but a list; write its objects without this list"),
        ('[{"text": "a"}]\n[{"text": "b"}]', r"line 2 is not a JSON object but a list; write its objects wi"),
        ("[[", r"line 1 is not a JSON object: .*; correct or delete it"),
        ('[{"text": "a"},\n{"text": "b"}', r"a\.json is cut off: no closing \] at the end of .* \(line 2\)"),
        ('[{"text": "a"},\n{"text": "b"},\n', r"a\.json is cut off: no closing \]"),
        ('[{"text": "]"}', r"a\.json is cut off: no closing \]"),
        ("[", r"a\.json is cut off: no closing \]"),
    ],
)
def test_invalid_json_files_are_named(tmp_path, content, message):
    write(tmp_path / "a.json", content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "caf\xe9"}]', r"is not UTF-8 text: line 1, byte 0xe9 at offset 14"),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\noid", r"is a git-lfs pointer"),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())[:-12], r"is damaged or cut off"),
        ("a.json", json.dumps([None, *ROWS]), r"line 1 is not a JSON object but null"),
        ("a.json", '[\n{"text": null}, {"text": "a"}]', r'line 2 has null in the field "text", not a string'),
        ("a.json", '[{"text": 3}, {"text": "a"}]', r'line 1 has a number in the field "text"'),
        (
            "a.json",
            '{"text": ["a"]}',
            r'line 1 has a list in the field "text", not a string; join its strings',
        ),
        ("a.json", '{"text', r"line 1 is not a JSON object: .*Unterminated string"),
        ("a.json", '[{"text": tru, "id": 1}' + 600 * " " + '{"text": "a"}]', r"line 1 is not a JSON object"),
        ("a.json", "[" * 5000, r"line 1 is not a JSON object"),
    ],
)
def test_json_files_that_cannot_be_read_are_rejected_also_in_a_folder(
    tmp_path, monkeypatch, name, content, message
):
    monkeypatch.setattr(records, "MAX_FIRST_RECORD", 500)
    monkeypatch.setattr(records, "CHUNK_CHARACTERS", 100 if "tru" in str(content) else 1 << 20)
    data = texts_folder(tmp_path / "data", "fine.txt")
    write(data / name, content)
    for source in (data / name, data):
        with pytest.raises(InputError, match=rf"{name} {message}"):
            read(source)


@pytest.mark.parametrize(
    "content",
    [
        '{"!": 0, "text": 5}',
        '{"text": {"model_type": "t5"}}',
        '{"text": null}',
        '{"text": true}',
        '{"text": []}',
        '{"text": [1, 2]}',
        "null",
        '[null, {"text": null}, {"text": 3}]',
    ],
)
def test_json_files_without_a_string_in_the_field_are_no_text(tmp_path, content):
    """Vocabularies and settings. A file in a list is text, so it is rejected."""
    write(tmp_path / "vocab.json", content)
    with pytest.raises(InputError, match=r'vocab\.json line 1 (has .* in the field "text"|is not a JSON)'):
        read(tmp_path / "vocab.json")
    with pytest.raises(InputError, match=r"is a folder without text files .*; set data\.text_field|correct"):
        read(tmp_path)
    write(tmp_path / "a.jsonl", JSONL)
    assert read(tmp_path) == (TEXTS, {unused.no_string(Fields("text")): 1})


CHATS = [
    {"messages": [{"role": "user", "content": "Hello"}]},
    {"id": 1, "meta": {"conversations": [{"from": "human", "value": "Hello"}]}},
]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_no_value_of_text_field_is_advised_for_a_chat(tmp_path, chat, name):
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        chat = chat.get("meta", chat)
        parquet.write_table(pyarrow.Table.from_pylist([chat]), path)
    else:
        write(path, json.dumps(chat))
    field = "messages" if "messages" in chat else "meta.conversations" if "meta" in chat else "conversations"
    rename = (
        "" if "messages" in chat else 'rename "from" and "value" of its messages to "role" and "content", '
    )
    advice = f"is a chat: {rename}set data.chat_field to {field}"
    for text_field in ("text", field, f"{field}.content"):
        sources = [path, tmp_path] if name == "a.json" else [path]
        for source in sources:
            with pytest.raises(InputError, match=advice):
                read(source, text_field=text_field)


def test_fields_of_deep_objects_are_listed(tmp_path):
    depth = 500
    write(tmp_path / "a.jsonl", '{"a": ' * depth + "1" + "}" * depth)
    with pytest.raises(InputError, match=r"its fields: a\.a\."):
        read(tmp_path / "a.jsonl")


def test_many_json_files_that_cannot_be_read_are_counted(tmp_path):
    for i in range(9):
        write(tmp_path / f"{i}.json", "version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(
        InputError, match=r"(?s)/4\.json is a git-lfs .*: 4 more \.json files have such"
    ) as error:
        read(tmp_path)
    assert "5.json" not in str(error.value)


def test_empty_json_files_are_counted(tmp_path):
    write(tmp_path / "a.txt", "word")
    write(tmp_path / "b.json", "")
    write(tmp_path / "c.json", "[]")
    assert read(tmp_path) == (["word"], {unused.EMPTY: 2})


def test_json_files_with_another_field_are_named_with_their_fields(tmp_path):
    for name in ("a.json", "b.json.gz"):
        content = json.dumps([{"content": "word", "meta": {"id": 1}}]).encode()
        write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(InputError) as error:
        read(tmp_path)
    assert (
        f'; it has .json files whose first record has no field "text": 2 ({tmp_path}/a.json, '
        f"{tmp_path}/b.json.gz); set data.text_field to the field with the text ({tmp_path}/a.json, its "
        "fields: content, meta.id); for Megatron data, give its prefix"
    ) in str(error.value)
    assert read(tmp_path, text_field="content") == (["word", "word"], {})
    write(tmp_path / "c.txt", "text")
    assert read(tmp_path) == (["text"], {'.json files whose first record has no field "text"': 2})


def test_text_may_begin_like_another_kind_of_file(tmp_path):
    for text in ("%PDF is the beginning of a PDF", "PAR1 is a gene", "BZh"):
        assert read(write(tmp_path / "a.txt", text)) == ([text], {})


def test_large_json_files_in_a_folder_are_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_FIRST_RECORD", 1000)
    monkeypatch.setattr(records, "CHUNK_CHARACTERS", 100)
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "vocabulary.json", json.dumps({"text": "x" * 2000}))
    assert read(tmp_path) == (["text"], {unused.OTHER_KIND: 1})
    assert read(tmp_path / "vocabulary.json") == (["x" * 2000], {})


def test_text_field_may_be_nested_or_have_a_dot(tmp_path):
    path = write(tmp_path / "a.jsonl", JSONL)
    assert read(path, text_field="meta.raw")[0] == [f"raw {i}" for i in range(6)]
    write(path, '{"meta.raw": "x"}\n{"meta": {"raw": "y"}}\n')
    assert read(path, text_field="meta.raw")[0] == ["x", "y"]
    write(path, '{"meta": "x"}\n')
    with pytest.raises(InputError, match=r'line 1 has no field "meta\.raw" \(its fields: meta\)'):
        read(path, text_field="meta.raw")


def test_empty_files_and_blank_records_are_counted(tmp_path):
    for name in ("a.txt", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst", "e.txt.bz2", "h.parquet"):
        write(tmp_path / name, "")
    write(tmp_path / "f.txt", "\n \n")
    write(tmp_path / "g.jsonl", '{"text": ""}\n\n{"text": " \\n"}\n{"text": "word"}\n')
    assert read(tmp_path) == (["word"], {unused.EMPTY: 6, unused.BLANK: 3})


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_long_line_is_cut_at_words(tmp_path, name):
    words = " ".join(f"word{i}" for i in range(40_000))
    write(tmp_path / name, words if name == "a.txt" else json.dumps({"text": words}) + "\n")
    pieces, _ = read(tmp_path / name)
    assert "".join(pieces) == words
    assert len(pieces) > 20
    assert max(map(len, pieces)) <= 5 * documents.MIN_PIECE
    # A token of most tokenizers is a word with the space before it, so no token is cut.
    assert all(piece.startswith(" word") for piece in pieces[1:])


def test_long_line_without_spaces_is_cut_between_characters(tmp_path):
    text = "\u4e2d\u6587e\u0301\U0001f469\u200d\U0001f467" * 12_000
    pieces, _ = read(write(tmp_path / "a.txt", text))
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert all(piece[0] not in "\u0301\u200d\U0001f467" for piece in pieces)


def test_lines_around_a_long_line_are_kept(tmp_path):
    text = "first\n" + "x y " * 9000 + "\nsecond\n\n" + "z" * 17_001 + "\nlast"
    path = write(tmp_path / "a.txt", text)
    pieces = list(read_pieces(path, 4000, Fields("text"), UnusedText()))
    assert "".join(piece.text for piece in pieces) == text
    lines = text.split("\n")
    for piece in pieces:
        assert (
            lines[piece.line - 1].endswith(piece.text.split("\n")[0])
            or piece.text[:40] in lines[piece.line - 1]
        )


def test_memory_for_one_long_line_is_bounded(tmp_path):
    path = write(tmp_path / "a.txt", b"some words " * (16 * 95_325))  # 16 MiB
    tracemalloc.start()
    length = sum(len(piece.text) for piece in read_pieces(path, 1 << 16, Fields("text"), UnusedText()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert length == path.stat().st_size
    assert peak < 3 << 20


def test_too_long_record_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD", 100)
    monkeypatch.setattr(records, "CHUNK_CHARACTERS", 30)
    write(tmp_path / "a.jsonl", JSONL + json.dumps({"text": "x" * 200}) + "\n")
    with pytest.raises(InputError, match=r"a\.jsonl line 7 has more than 100 characters; divide it"):
        read(tmp_path / "a.jsonl")
    write(tmp_path / "a.json", json.dumps([{"text": "x"}, {"text": "x" * 200}], indent=1))
    with pytest.raises(InputError, match=r"a\.json line 5 has more than 100 characters; divide it"):
        read(tmp_path / "a.json")


def texts_folder(folder, *names):
    for name in names:
        write(folder / name, f"text of {folder.name}/{name}")
    return folder


def test_links_to_folders_and_files_are_followed(tmp_path):
    texts_folder(tmp_path / "data" / "own", "a.txt", "deep/b.txt")
    texts_folder(tmp_path / "scratch" / "books", "c.txt", "more/d.txt")
    texts_folder(tmp_path / "scratch" / "wiki", "e.txt")
    (tmp_path / "scratch" / "books" / "wiki").symlink_to("../wiki")
    (tmp_path / "data" / "books").symlink_to(tmp_path / "scratch" / "books")
    (tmp_path / "data" / "single.txt").symlink_to(write(tmp_path / "scratch" / "f.txt", "single"))
    assert names_of(tmp_path / "data") == [
        "books/c.txt",
        "books/more/d.txt",
        "books/wiki/e.txt",
        "own/a.txt",
        "own/deep/b.txt",
        "single.txt",
    ]
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "books").symlink_to(tmp_path / "scratch" / "books")
    assert len(read(tmp_path / "links")[0]) == 3
    (tmp_path / "entry").symlink_to(tmp_path / "links")
    assert len(read(tmp_path / "entry")[0]) == 3


def test_each_file_is_read_once(tmp_path):
    """Also through links to a file, to a folder, hard links, and overlapping entries of a list."""
    data = texts_folder(tmp_path / "data", "b/one.txt", "b/two.txt", "c.txt")
    (data / "a").symlink_to("b")
    (data / "aa.txt").symlink_to("b/one.txt")
    os.link(data / "c.txt", data / "d.txt")
    assert names_of(data) == ["b/one.txt", "b/two.txt", "c.txt"]
    assert read(data)[1] == {unused.REPEATED: 3}
    several = DataConfig(source=[str(data / "b"), str(data), str(data / "c.txt")])
    sources = find_sources(several)
    assert [name for name, _ in sources["source"].files] == ["one.txt", "two.txt", "c.txt"]
    assert sources["source"].unused.tallies[unused.REPEATED].count >= 4


def test_entries_of_a_list_may_overlap_in_any_order(tmp_path):
    data = texts_folder(tmp_path / "data", "a.txt", "b/c.txt", "b/d/e.txt")
    texts_folder(tmp_path / "images", "x.png")
    (tmp_path / "link").symlink_to(data / "b")
    for entries in (["data", "data/b"], ["data/b", "data"], ["data", "data"], ["data", "link", "data/b/d"]):
        sources = find_sources(DataConfig(source=[str(tmp_path / entry) for entry in entries]))
        assert sorted(path.name for _, path in sources["source"].files) == ["a.txt", "c.txt", "e.txt"]
        assert set(unused_text(sources).tallies) == {unused.REPEATED}
    with pytest.raises(InputError) as error:
        find_sources(DataConfig(source=[str(data), str(data), str(tmp_path / "images")]))
    assert f"it has files of other kinds: 1 ({tmp_path}/images/x.png)" in str(error.value)
    (tmp_path / "images" / "one").mkdir()
    (tmp_path / "images" / "two").symlink_to("one")
    with pytest.raises(InputError, match="images is a folder without text files"):
        read(tmp_path / "images")


def test_link_loops_are_counted(tmp_path):
    data = texts_folder(tmp_path / "data", "a.txt", "deep/b.txt")
    (data / "deep" / "up").symlink_to("..")
    (data / "deep" / "here").symlink_to(".")
    (data / "above").symlink_to(tmp_path)
    other = texts_folder(tmp_path / "other", "c.txt")
    (data / "other").symlink_to(other)
    (other / "back").symlink_to(data)
    assert names_of(data) == ["a.txt", "deep/b.txt", "other/c.txt"]
    assert read(data)[1] == {unused.LOOP: 3, unused.REPEATED: 1}


def test_broken_links_and_unreadable_folders_are_rejected(tmp_path, monkeypatch):
    data = texts_folder(tmp_path / "data", "a.txt")
    (data / "books").symlink_to(tmp_path / "gone")
    (data / "self.txt").symlink_to("self.txt")
    with pytest.raises(
        InputError, match=r"(?s)books is a link to .*gone, which .*self\.txt is a link to self"
    ):
        read(data)
    with pytest.raises(InputError, match=r"data\.source: .*books is a link to .*gone"):
        read(data / "books")
    (data / "books").unlink()
    (data / "self.txt").unlink()
    (data / "shut").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"shut cannot be read: Permission denied; make it readable"):
        read(data)


def test_files_that_are_not_read_are_counted(tmp_path):
    data = texts_folder(
        tmp_path / "data", "a.txt", "README.md", "LICENSE", "b.csv", "c.tar.gz", "d.gz", "e.zip"
    )
    texts_folder(data, ".hidden.txt", ".cache/x.txt", "__MACOSX/._a.txt")
    write(data / "config.json", '{"architectures": ["x"]}')
    write(data / "numbers.json", "[1, 2]")
    write(data / "more.json", json.dumps({"text": "more"}))
    write(data / "both.jsonl", '{"text": "both"}')
    write(data / "both.jsonl.gz", gzip.compress(b'{"text": "both"}', mtime=0))
    os.mkfifo(data / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(data)
        server.bind("s.txt")
    texts, counts = read(data)
    assert texts == ["text of data/a.txt", "both", "more"]
    assert counts == {
        unused.OTHER_KIND: 6,
        unused.no_field(Fields("text")): 2,
        unused.HIDDEN: 3,
        unused.PACKED: 1,
        unused.SPECIAL: 2,
    }
    summary = unused_text(find_sources(DataConfig(source=str(data)))).summary()
    assert f"files of other kinds: 6 ({data}/LICENSE, {data}/README.md, " in summary
    assert f"their unpacked form, which is read: 1 ({data}/both.jsonl.gz)" in summary
    for path in (data / "a.txt", data / "both.jsonl", data / "both.jsonl.gz", data / "more.json"):
        path.unlink()
    with pytest.raises(
        InputError, match=r"folder without text files .*it has hidden .*files of other kinds: 6 "
    ):
        read(data)


def test_output_in_the_text_folder_is_not_read(tmp_path):
    proj = texts_folder(tmp_path / "proj", "a.txt", "deep/b.txt")
    output = proj / "deep" / "out"
    write(output / "stages.jsonl", '{"stage":"import"}\n')
    write(proj / "earlier" / "stages.jsonl", '{"stage":"import","seconds":1}\n')
    write(proj / "mine" / "stages.jsonl", '{"text": "a stage of the Tour"}\n')
    assert names_of(proj, output) == ["a.txt", "deep/b.txt", "mine/stages.jsonl"]
    assert read(proj, output=output)[1] == {unused.OUTPUT: 2}
    data = DataConfig(source=str(proj))
    before = corpus_fingerprint(data, output=output)
    write(output / "report.txt", "new")
    assert corpus_fingerprint(data, output=output) == before
    with pytest.raises(InputError, match="earlier is an output folder of minitron-mp, whose files are not"):
        read(proj / "earlier", output=output)
    (tmp_path / "link").symlink_to(proj)
    for folder in (proj, tmp_path / "link"):
        with pytest.raises(InputError, match=r"data\.source and output are the same folder \(.*set another"):
            read(folder, output=proj)
    assert names_of(proj / "deep", tmp_path) == ["b.txt"]  # the text may lie in the output folder


def reader(path):
    with open_text(path) as file:
        yield file.read()


def test_changes_while_a_file_is_read_are_rejected(tmp_path):
    path = write(tmp_path / "a.txt", "line\n" * 5)
    file = reader(path)
    assert next(file) == "line\n" * 5
    write(path, "line\n" * 6)
    with pytest.raises(InputError, match=r"a\.txt changed while it was read \(25 bytes before, 30 after\)"):
        next(file)
    file = reader(path)
    next(file)
    path.unlink()
    with pytest.raises(InputError, match=r"a\.txt vanished while the text was read"):
        next(file)
    with pytest.raises(InputError, match=r"gone\.jsonl vanished"):
        list(read_pieces(tmp_path / "gone.jsonl", 4000, Fields("text"), UnusedText()))


def test_empty_entries_are_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(texts_folder(tmp_path, "a.txt"))
    for source in ("", [""], ["a.txt", ""]):
        with pytest.raises(InputError, match=r"data\.source is empty"):
            find_sources(DataConfig(source=source))


@pytest.mark.parametrize(
    ("source", "folder"), [("t/*.txt", "t"), ("*.txt", r"\."), ("t/*/a?.txt", "t"), ("/t/[ab].txt", "/t")]
)
def test_wildcards_are_rejected_with_the_folder(tmp_path, monkeypatch, source, folder):
    monkeypatch.chdir(texts_folder(tmp_path, "t/a.txt").parent)
    with pytest.raises(
        InputError, match=rf"txt does not exist, and wildcards are not .* the folder {folder}$"
    ):
        read(source)


def test_names_may_have_wildcards(tmp_path):
    assert read(write(tmp_path / "a[1]*.txt", "text")) == (["text"], {})


def test_beginnings_of_files_are_checked_before_a_run(tmp_path):
    data = tmp_path / "data"
    for i in range(9):
        write(data / f"{i}.jsonl", '{"content": "x"}\n')
    write(data / "a.txt", "fine")
    problems = corpus_problems(DataConfig(source=str(data)), tmp_path / "out", None)
    assert len(problems) == 6
    assert problems[0].startswith(f'{data}/0.jsonl line 1 has no field "text"')
    assert problems[-1] == "4 more files have such problems"
    settings = DataConfig(source=str(data), text_field="content")
    assert corpus_problems(settings, tmp_path / "out", None) == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_recipes_may_have_a_byte_order_mark(tmp_path, encoding):
    write(tmp_path / "r.yaml", "model: fl\u00fc\u00df\noutput: out\n".encode(encoding))
    assert load_recipe(tmp_path / "r.yaml").model == "fl\u00fc\u00df"
    write(tmp_path / "r.yaml", b"model: fl\xfc\n")
    with pytest.raises(InputError, match=r"r\.yaml is not UTF-8 text: line 1, byte 0xfc at offset 9"):
        load_recipe(tmp_path / "r.yaml")


def test_text_does_not_depend_on_the_place_of_its_folder(tmp_path):
    first = texts_folder(tmp_path / "one" / "data", "a.txt", "b/c.txt")
    shutil.copytree(first, tmp_path / "two" / "data")
    assert names_of(first) == names_of(tmp_path / "two" / "data")


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("a.jsonl", '{"text": ""}\n' * 3),
        ("a.jsonl", json.dumps({"text": "\n" * 9000}) + "\n"),
        ("a.txt", "\n" * 5000),
        ("a.txt", " " * 3_000_000),
    ],
)
def test_a_text_may_begin_blank(tmp_path, monkeypatch, name, beginning):
    """The first record of WikiText is blank. A text is empty if all of it is blank."""
    data, output = DataConfig(source=str(tmp_path / "data")), tmp_path / "out"
    for folder in ("one", "two"):
        write(tmp_path / "data" / folder / name, beginning + JSONL)
    assert corpus_problems(data, output, None) == []
    write(tmp_path / "data" / "one" / name, beginning)
    assert corpus_problems(data, output, None) == []
    write(tmp_path / "data" / "two" / name, beginning)
    (problem,) = corpus_problems(data, output, None)
    assert problem.startswith("all files of source are empty")
    monkeypatch.setattr(checks, "MAX_BLANK_PIECES", 0)  # the rest of the files is not checked
    assert corpus_problems(data, output, None) == []


def test_a_table_may_begin_blank(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = DataConfig(source=str(tmp_path / "a.parquet"))
    parquet.write_table(pyarrow.table({"text": ["", " ", "word"]}), tmp_path / "a.parquet")
    assert corpus_problems(data, tmp_path / "out", None) == []
    parquet.write_table(pyarrow.table({"text": ["", " "]}), tmp_path / "a.parquet")
    assert "are empty" in corpus_problems(data, tmp_path / "out", None)[0]


def test_a_small_text_must_have_documents_for_each_part(tmp_path):
    """With the message of the stage data, but before the first stage."""
    path = write(tmp_path / "a.txt", "a line of six words in a text\n" * 200)
    data, output = DataConfig(source=str(path)), tmp_path / "out"
    (problem,) = corpus_problems(data, output, None, seed=1)
    assert problem.startswith("no text for ")
    assert "source has 1 documents that are not blank; give more text, raise data.valid_fraction" in problem
    write(path, "a line of six words in a text\n\n" * 40_000)
    assert corpus_problems(data, output, None, seed=1) == []
    path = write(tmp_path / "a.jsonl", JSONL + '{"text": 3}\n')
    (problem,) = corpus_problems(DataConfig(source=str(path)), output, None, seed=1)
    assert 'a.jsonl line 7 has a number in the field "text"' in problem


@pytest.mark.parametrize(
    "settings",
    [
        {"source": ["python-stdlib", "a.txt"]},
        {"calibration": ["python-stdlib"], "train": ["a.txt"], "valid": ["a.txt"]},
    ],
)
def test_the_standard_library_is_not_combined_with_other_text(tmp_path, monkeypatch, settings):
    monkeypatch.chdir(texts_folder(tmp_path, "a.txt"))
    with pytest.raises(InputError, match=r"python-stdlib is not a file or folder .*; give it alone as data"):
        find_sources(DataConfig(**settings))


def test_folders_may_be_nested_deeper_than_calls(tmp_path):
    depth, limit = 300, sys.getrecursionlimit()
    descriptor = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=descriptor)
        inner = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    with open(os.open("a.txt", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor), "w") as file:
        file.write("text")
    os.close(descriptor)
    sys.setrecursionlimit(len(inspect.stack()) + 200)
    try:
        names = names_of(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert names == ["d/" * depth + "a.txt"]
