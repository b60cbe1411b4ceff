"""Text on disk, in and out: files of the user -> the three parts of a run as Megatron indexed datasets.

tokenize() writes <part>.bin, <part>.idx and parts.json, which names the prefixes of each part. Megatron data listed for a part
stays where it is and is only named there; as data.source it is cut by document like text. The module itself imports neither torch nor Megatron.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import struct
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minitron_mp.artifacts.files import fingerprint_files, read_json, write_text
from minitron_mp.config.data import DataConfig
from minitron_mp.errors import InputError, refuse

if TYPE_CHECKING:
    from minitron_mp.data.tokenizer import Tokenizer

STDLIB = "python-stdlib"

PARTS = ("calibration", "train", "valid")

PARTS_FILE = "parts.json"

PIECE = 1 << 20
"""Characters after which a document is cut."""

FEW = 10
"""Documents that a held-out part is to expect; a source with fewer shares out pieces of documents instead."""

Files = list[tuple[str, Path]]
"""(name, path) of text files; the name does not depend on where the folder lies."""


def tokenize_corpus(
    data: DataConfig,
    tokenizer: Tokenizer,
    output: Path,
    seed: int,
    *,
    further: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Write the three parts, or with `further` those of data.held_out, below output and return the tokens of each. For one process.

    progress hears how many documents are done.
    A document of data.source goes to a part by a hash of seed and its name, the same on every machine. A text begins with bos, where the tokenizer
    itself begins texts so, and ends with eod; Megatron data stays as it is.
    InputError for a missing path, a bad line, a part without documents, Megatron data with ids that the tokenizer lacks.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    inputs, names = _inputs(data, further), list(data.held_out) if further else list(PARTS)
    for _, prefixes in inputs.values():
        for prefix in prefixes:
            _check_ids(prefix, tokenizer.vocab_size)

    output.mkdir(parents=True, exist_ok=True)
    builders: dict[str, IndexedDatasetBuilder] = {}
    documents, done = _documents(inputs, data.valid_fraction, seed), 0
    first = [] if tokenizer.bos is None else [tokenizer.bos]

    def add(part: str, ids: np.ndarray) -> None:
        if part not in builders:
            builders[part] = IndexedDatasetBuilder(
                str(output / f"{part}.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size)
            )
        builders[part].add_document(ids, [len(ids)])

    while batch := _batch(documents):
        for (part, _), ids in zip(batch, tokenizer.encode([text for _, text in batch])):
            add(part, np.array([*first, *ids, tokenizer.eod]))
        done += len(batch)
        if progress:
            progress(done)
    for prefix in inputs.get("source", ([], []))[1]:
        for number, document in enumerate(_tokenized(prefix)):
            add(_part_of(f"{seed}:{Path(prefix).name}:{number}", data.valid_fraction), document)
            done += 1
    for part, builder in builders.items():
        builder.finalize(str(output / f"{part}.idx"))

    parts = {
        part: [part] * (part in builders) + (inputs[part][1] if part in inputs else []) for part in names
    }
    if empty := [part for part in parts if not parts[part]]:
        cure = f"raise data.valid_fraction ({data.valid_fraction}), or list data.calibration, data.train and data.valid"
        held = (
            "its documents are blank"
            if data.train
            else f"{', '.join(inputs)} held {done} documents that are not blank; give more, {cure}"
        )
        raise InputError(f"no text for {', '.join(empty)}: {held}")
    write_text(output / PARTS_FILE, json.dumps(parts, indent=1))
    return {part: sum(tokens_of(prefix)[0] for prefix in prefixes_of(output, part)) for part in parts}


def corpus_problems(data: DataConfig) -> list[str]:
    """One sentence for each path of the recipe's text that cannot be used."""
    try:
        _inputs(data)
        _inputs(data, further=True)
    except InputError as error:
        return [row.removeprefix("  - ") for row in str(error).splitlines()[1:]]
    return []


def corpus_fingerprint(data: DataConfig, further: bool = False) -> str:
    """Identity of the text: of the files, or of the Python whose standard library is read. The tokenizer is no part of it. further: of data.held_out."""
    rows = []
    for field, (files, prefixes) in _inputs(data, further).items():
        paths = [path for _, path in files] + [
            Path(prefix + suffix) for prefix in prefixes for suffix in (".bin", ".idx")
        ]
        if field == STDLIB:
            rows.append(
                f"{STDLIB} {platform.python_version()}: {len(paths)} files, {sum(path.stat().st_size for path in paths)} bytes"
            )
        else:
            names = hashlib.sha256(repr([name for name, _ in files]).encode()).hexdigest()[
                :16
            ]  # a document's name and place choose its part
            rows.append(f"{field} {names} {fingerprint_files(paths)}")
    return ", ".join(rows)


def shared_parts(data: DataConfig, one: str, other: str) -> list[str]:
    """Files and Megatron prefixes that two listed parts both hold."""
    held = [
        {str(path.resolve()) for _, path in files} | set(prefixes)
        for files, prefixes in map(_inputs(data).__getitem__, (one, other))
    ]
    return sorted(held[0] & held[1])


def prefixes_of(folder: Path, part: str) -> list[str]:
    """Absolute prefixes of a part; one that is absolute in parts.json stays as it is."""
    return [str(folder.resolve() / prefix) for prefix in read_json(folder / PARTS_FILE, "data --force")[part]]


def tokens_of(prefix: str) -> tuple[int, np.dtype]:
    """Number of tokens and their dtype; InputError when the pair of files is damaged, empty or incomplete."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        size = Path(prefix + ".bin").stat().st_size
        dataset = IndexedDataset(
            prefix
        )  # needs a name: its arrays point into a map of the file that goes with it
        num_tokens, dtype = int(dataset.sequence_lengths.sum()), np.dtype(dataset.index.dtype)
    except (AssertionError, ValueError, OSError, struct.error) as error:
        raise InputError(
            f"{prefix}.bin and .idx are no Megatron indexed dataset ({error}); make or copy them again"
        ) from error
    if not 0 < num_tokens * dtype.itemsize <= size:
        raise InputError(
            f"{prefix}.bin has {size} bytes, its index tells of {num_tokens} tokens of {dtype.itemsize} bytes; make or copy it again"
        )
    return num_tokens, dtype


def _inputs(data: DataConfig, further: bool = False) -> dict[str, tuple[Files, list[str]]]:
    """Text files and absolute Megatron prefixes of each part when the parts are listed, else of "source" or "python-stdlib"; or of data.held_out."""
    problems: list[str] = []
    if further:
        inputs = {
            name: _resolve(entries, f"data.held_out.{name}", problems)
            for name, entries in data.held_out.items()
        }
    elif not data.train and data.source in (STDLIB, [STDLIB]):
        inputs = {STDLIB: (_stdlib_files(), [])}
    else:
        source = [data.source] if isinstance(data.source, str) else data.source
        fields = {part: getattr(data, part) for part in PARTS} if data.train else {"source": source}
        inputs = {field: _resolve(entries, f"data.{field}", problems) for field, entries in fields.items()}
    refuse("text that cannot be used:", problems)
    return inputs


def _stdlib_files() -> Files:
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    return [
        (name, root / name)
        for name in sorted(path.as_posix() for path in names if not skip.intersection(path.parts))
    ]


def _resolve(entries: list[str], field: str, problems: list[str]) -> tuple[Files, list[str]]:
    """Text files and absolute Megatron prefixes of the entries; adds a sentence to problems for each entry that cannot be used."""
    files: Files = []
    prefixes: list[str] = []
    if not entries:
        problems.append(f"{field} is empty; give files or folders of .txt and .jsonl")
    for entry in entries:
        path, prefix = Path(entry), entry.removesuffix(".bin").removesuffix(".idx")
        if (
            Path(prefix + ".bin").is_file() and Path(prefix + ".idx").is_file()
        ):  # before folders: Megatron makes <prefix>/cache
            prefixes.append(str(Path(prefix).resolve()))
        elif path.is_dir():
            names = sorted(
                p.relative_to(path).as_posix() for p in path.rglob("*") if p.suffix in (".txt", ".jsonl")
            )
            files += [(name, path / name) for name in names]
            if not names:
                problems.append(
                    f"{field}: {entry} is a folder without .txt and .jsonl files (Megatron data is named by its prefix)"
                )
        elif path.suffix in (".txt", ".jsonl") and path.is_file():
            files.append((path.name, path))
        elif path.exists():
            problems.append(f"{field}: {entry} is no .txt or .jsonl file, nor one of a .bin and .idx pair")
        else:
            problems.append(
                f"{field}: {entry} does not exist, nor do {prefix}.bin and {prefix}.idx; paths are relative to {Path.cwd()}"
            )
    return files, prefixes


def _batch(documents: Iterator[tuple[str, str]], size: int = 1 << 21) -> list[tuple[str, str]]:
    """The next documents, at least size characters of them while they last: a tokenizer takes some 150 bytes of memory a character."""
    batch, length = [], 0
    for part, text in documents:
        batch.append((part, text))
        length += len(text)
        if length >= size:
            break
    return batch


def _documents(
    inputs: dict[str, tuple[Files, list[str]]], valid_fraction: float, seed: int
) -> Iterator[tuple[str, str]]:
    """(part, text) of every document that is not blank; all of a document is in one part.

    Except where a source has so few that a part might get none: there they are cut to a thousandth of it, and the pieces are shared out.
    """
    for field, (files, _) in inputs.items():
        whole = field != "source" or _has_documents(files, math.ceil(FEW / valid_fraction))
        longest = (
            PIECE if whole else min(max(4000, sum(path.stat().st_size for _, path in files) // 1000), PIECE)
        )
        for name, path in files:
            for number, (document, text) in enumerate(_texts(path, longest)):
                if text.strip():
                    place = f"{seed}:{name}:{document if whole else number}"
                    yield _part_of(place, valid_fraction) if field in ("source", STDLIB) else field, text


def _has_documents(files: Files, count: int) -> bool:
    """Whether there are so many; reads no further than it has to."""
    for _, path in files:
        if path.suffix == ".jsonl":
            with path.open("rb") as file:
                count -= sum(1 for _ in islice((line for line in file if line.strip()), count))
        else:
            count -= 1
        if count <= 0:
            return True
    return False


def _part_of(name: str, valid_fraction: float) -> str:
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "calibration" if share < valid_fraction else "valid" if share < 2 * valid_fraction else "train"


def _texts(path: Path, piece_size: int) -> Iterator[tuple[int, str]]:
    """(number of the document, a piece of it) of a file, or of each record of .jsonl; most have one. None of a .py that is not UTF-8."""
    try:
        with path.open(encoding="utf-8") as file:
            documents: Iterable[Iterable[str]] = [file]
            if path.suffix == ".jsonl":
                documents = (record.splitlines(keepends=True) for record in _records(file, path))
            for number, lines in enumerate(documents):
                yield from ((number, piece) for piece in _pieces(lines, piece_size))
    except UnicodeDecodeError as error:
        if path.suffix != ".py":
            raise InputError(
                f"{path} is not UTF-8 text ({error.reason}); convert it, for example with iconv"
            ) from error


def _records(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            text = None
            with suppress(ValueError, KeyError, TypeError):
                text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise InputError(
                    f'{path} line {number} is no JSON object with a string in the field "text": {line[:80].strip()!r}'
                )
            yield text


def _pieces(lines: Iterable[str], size: int) -> Iterator[str]:
    """Pieces of at least size characters that end at a blank line, or at any line after four times the size."""
    piece: list[str] = []
    length = 0
    for line in lines:
        piece.append(line)
        length += len(line)
        if length >= (4 * size if line.strip() else size):
            yield "".join(piece)
            piece, length = [], 0
    yield "".join(piece)


def _tokenized(prefix: str) -> Iterator[np.ndarray]:
    """Token ids of each document of Megatron data, as they are."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    bounds = dataset.document_indices
    for first, last in pairwise(bounds):
        yield np.concatenate([dataset[i] for i in range(first, last)])


def _check_ids(prefix: str, vocab_size: int) -> None:
    """InputError when the first or last 4 Mi tokens (all, when there are fewer) hold an id that the tokenizer lacks."""
    ids, many = np.memmap(prefix + ".bin", tokens_of(prefix)[1], mode="r"), 1 << 22
    largest = max(ids[:many].max(), ids[-many:].max())
    if largest >= vocab_size:
        raise InputError(
            f"{prefix} holds token id {largest}, the tokenizer has ids up to {vocab_size - 1}; tokenize the text again, or set data.tokenizer"
        )
