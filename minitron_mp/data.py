"""Text in, microbatches out: tokenizers, the three parts of the text as Megatron indexed datasets, and which rank reads which sample.

    s sequence_length  b micro_batch_size

tokenize() writes <part>.bin, <part>.idx and parts.json, which names the prefixes of each part; Megatron data that the user
already has stays where it is and is only named there. samples() opens a part with Megatron's GPTDataset. micro_batches() is a
pure function of the step, so that an exact resume needs nothing but the step.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from minitron_mp.artifact import fingerprint_files, write_text
from minitron_mp.config import Data, InputError, refuse

STDLIB = "python-stdlib"
PARTS = ("calibration", "train", "valid")
PARTS_FILE = "parts.json"
KEYS = ("tokens", "labels", "loss_mask", "position_ids")

Files = list[tuple[str, Path]]
"""(name, path) of text files; the name does not depend on where the folder lies."""


@dataclass(frozen=True)
class Tokenizer:
    """What we and Megatron's GPTDatasetConfig need of a tokenizer."""

    encode: Callable[[list[str]], list[list[int]]]
    """Token ids of each text, without special tokens around them."""
    vocab_size: int
    """Largest id + 1."""
    eod: int
    """Id that ends a document."""
    pad: ClassVar[int] = -1
    """No text holds it: Megatron masks the loss where a label is the pad id, and a real id would lose its loss."""

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        return OrderedDict({"class": "Tokenizer", "vocab_size": self.vocab_size, "eod": self.eod})


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Tokenizer of a Hugging Face folder or a sentencepiece .model file; InputError when there is none or it cannot end a document."""
    path = Path(path)
    if not (path.is_dir() or (path.suffix == ".model" and path.is_file())):
        raise InputError(f"no tokenizer at {path}; give a Hugging Face folder (tokenizer.json) or a sentencepiece .model file")
    try:
        encode, vocab_size, eod = (_hugging_face if path.is_dir() else _sentencepiece)(path)
    except Exception as error:  # whatever a foreign file makes transformers or sentencepiece raise
        raise InputError(f"{path} cannot be read as a tokenizer ({error}); give a Hugging Face folder or a sentencepiece .model file") from error
    if eod is None:
        raise InputError(f"the tokenizer in {path} has no end-of-sequence (eos) or separator (sep) token to end documents with; set eos_token")
    return Tokenizer(encode, vocab_size, eod)


def _hugging_face(folder: Path) -> tuple[Callable[[list[str]], list[list[int]]], int, int | None]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]

    eod = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return encode, max(tokenizer.get_vocab().values()) + 1, eod


def _sentencepiece(file: Path) -> tuple[Callable[[list[str]], list[list[int]]], int, int | None]:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    return model.encode, model.vocab_size(), model.eos_id() if model.eos_id() >= 0 else None


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """InputError when the tokenizer has ids that the model's embedding lacks."""
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's embedding has {vocab_size} rows; "
            "set data.tokenizer to the tokenizer that the model was trained with"
        )


def tokenize(data: Data, tokenizer: Tokenizer, output: Path, seed: int, *, progress: Callable[[int], None] | None = None) -> dict[str, int]:
    """Write the three parts below output and return the tokens of each; progress hears how many documents are done. For one process.

    A document of data.source goes to a part by a hash of seed and its name, the same on every machine. eod ends each document.
    InputError for a missing path, a bad line, a part without documents, Megatron data with ids that the tokenizer lacks.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    inputs = _inputs(data)
    for _, prefixes in inputs.values():
        for prefix in prefixes:
            _check_ids(prefix, tokenizer.vocab_size)

    output.mkdir(parents=True, exist_ok=True)
    builders: dict[str, IndexedDatasetBuilder] = {}
    documents, done = _documents(inputs, data.valid_fraction, seed), 0
    while batch := _batch(documents):
        for (part, _), ids in zip(batch, tokenizer.encode([text for _, text in batch])):
            if part not in builders:
                builders[part] = IndexedDatasetBuilder(str(output / f"{part}.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
            builders[part].add_document(np.array([*ids, tokenizer.eod]), [len(ids) + 1])
        done += len(batch)
        if progress:
            progress(done)
    for part, builder in builders.items():
        builder.finalize(str(output / f"{part}.idx"))

    parts = {part: [part] * (part in builders) + (inputs[part][1] if part in inputs else []) for part in PARTS}
    if empty := [part for part in PARTS if not parts[part]]:
        cure = f"raise data.valid_fraction ({data.valid_fraction}), or list data.calibration, data.train and data.valid"
        held = "its documents are blank" if data.train else f"{', '.join(inputs)} held {done} documents that are not blank; give more, {cure}"
        raise InputError(f"no text for {', '.join(empty)}: {held}")
    write_text(output / PARTS_FILE, json.dumps(parts, indent=1))
    return {part: sum(_index(prefix)[0] for prefix in _prefixes(output, part)) for part in PARTS}


def fingerprint(data: Data) -> str:
    """Identity of the text: of the files, or of the Python whose standard library is read. The tokenizer is no part of it."""
    rows = []
    for field, (files, prefixes) in _inputs(data).items():
        paths = [path for _, path in files] + [Path(prefix + suffix) for prefix in prefixes for suffix in (".bin", ".idx")]
        if field == STDLIB:
            rows.append(f"{STDLIB} {platform.python_version()}: {len(paths)} files, {sum(path.stat().st_size for path in paths)} bytes")
        else:
            rows.append(f"{field} {fingerprint_files(paths)}")
    return ", ".join(rows)


def samples(folder: Path, part: str, sequence_length: int, num_samples: int, seed: int, tokenizer: Tokenizer, *, repeat: bool) -> Dataset:
    """Map-style dataset of at least num_samples samples of a part; every rank calls it, with or without torch.distributed.

    A sample is {tokens, labels, position_ids: int64 [s], loss_mask: float32 [s]}; labels are the tokens one further.
    The order depends on seed, num_samples and the text. Several prefixes are mixed in proportion to their sizes.
    repeat=False: InputError when one epoch has fewer samples. repeat=True: epochs repeat, as Megatron shuffles them.
    """
    prefixes = _prefixes(folder, part)
    tokens = [_index(prefix)[0] for prefix in prefixes]
    held = [max(0, n - 1) // sequence_length for n in tokens]
    short = [f"{prefix} holds {num} tokens" for prefix, num, n in zip(prefixes, tokens, held) if n == 0]
    refuse(f"{part} text is too short for one sample of {sequence_length} tokens and a label; lower data.sequence_length or give more text:", short)
    if not repeat and sum(held) < num_samples:
        setting = {"calibration": "score.num_samples", "valid": "evaluate.num_samples"}.get(part, "the number of samples")
        raise InputError(
            f"{part} text holds {sum(held)} samples of {sequence_length} tokens, {num_samples} are wanted; lower {setting} to at most {sum(held)}, "
            "lower data.sequence_length, or give more text (more of data.source, a larger data.valid_fraction, or a longer data." + part + ")"
        )
    wanted = [-(-num_samples * n // sum(held)) for n in held]  # rounded up, never above held unless repeated
    datasets = [_gpt_dataset(p, n, folder / "index", sequence_length, seed, tokenizer) for p, n in zip(prefixes, wanted)]
    return datasets[0] if len(datasets) == 1 else _interleave(datasets, wanted)


def _gpt_dataset(prefix: str, num_samples: int, cache: Path, sequence_length: int, seed: int, tokenizer: Tokenizer) -> Dataset:
    """Megatron's dataset over one prefix: rank 0 writes the index to cache, then a barrier, then the others read it."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend_per_split=[([prefix], None), None, None],
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        create_attention_mask=False,
        reset_attention_mask=False,
        reset_position_ids=False,
        eod_mask_loss=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config).build()[0]


def _interleave(datasets: list[Dataset], counts: list[int]) -> Dataset:
    """The first counts[i] samples of dataset i, spread evenly: counts [4, 2] give 0 1 0 0 1 0.

    Not Megatron's BlendedDataset: in 0.16.1 it fails without torch.distributed (fixed in 0.19).
    """
    starts = np.cumsum([0, *map(len, datasets)])
    ids = np.concatenate([start + np.arange(n) for start, n in zip(starts, counts)])
    place = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    return Subset(ConcatDataset(datasets), ids[np.argsort(place, kind="stable")])


def micro_batches(
    dataset: Dataset, step: int, *, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int, limit: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """This data-parallel rank's microbatches of a step (from 0): tokens, labels, position_ids int64 [b, s], loss_mask float32 [b, s].

    The step reads samples [step * gbs, (step + 1) * gbs) in microbatches of consecutive samples; rank m % dp_size has microbatch m.
    Samples from limit on are sample 0 with loss_mask 0, so that every rank has equally many microbatches of a last, partial batch.
    """
    unit = micro_batch_size * dp_size
    if global_batch_size % unit:
        near = max(1, round(global_batch_size / unit)) * unit
        raise InputError(
            f"global batch size {global_batch_size} must be a multiple of {unit} (micro_batch_size {micro_batch_size} x data parallel size {dp_size}); "
            f"nearest {near}"
        )
    first = step * global_batch_size + dp_rank * micro_batch_size
    starts = range(first, (step + 1) * global_batch_size, unit)
    return [_micro_batch(dataset, range(start, start + micro_batch_size), limit) for start in starts]


def _micro_batch(dataset: Dataset, ids: range, limit: int | None) -> dict[str, torch.Tensor]:
    real = [limit is None or i < limit for i in ids]
    rows = [dataset[i if r else 0] for i, r in zip(ids, real)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in KEYS}
    batch["loss_mask"] *= torch.tensor(real)[:, None]
    return batch


def _inputs(data: Data) -> dict[str, tuple[Files, list[str]]]:
    """Text files and absolute Megatron prefixes of each part when the parts are listed, else of "source" or "python-stdlib"."""
    if not data.train and data.source == STDLIB:
        return {STDLIB: (_stdlib_files(), [])}
    source = [data.source] if isinstance(data.source, str) else data.source
    fields = {part: getattr(data, part) for part in PARTS} if data.train else {"source": source}
    problems: list[str] = []
    inputs = {field: _resolve(entries, f"data.{field}", problems) for field, entries in fields.items()}
    refuse("text that cannot be used:", problems)
    return inputs


def _stdlib_files() -> Files:
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    return [(name, root / name) for name in sorted(path.as_posix() for path in names if not skip.intersection(path.parts))]


def _resolve(entries: list[str], field: str, problems: list[str]) -> tuple[Files, list[str]]:
    """Text files and absolute Megatron prefixes of the entries; adds a sentence to problems for each entry that cannot be used."""
    files: Files = []
    prefixes: list[str] = []
    if not entries:
        problems.append(f"{field} is empty; give files or folders of .txt and .jsonl")
    for entry in entries:
        path, prefix = Path(entry), entry.removesuffix(".bin").removesuffix(".idx")
        if Path(prefix + ".bin").is_file() and Path(prefix + ".idx").is_file():  # before folders: Megatron makes <prefix>/cache
            prefixes.append(str(Path(prefix).resolve()))
            if field == "data.source":
                problems.append(f"{field}: {entry} is Megatron data, which is not cut into parts; give data.calibration, data.train and data.valid")
        elif path.is_dir():
            names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
            files += [(name, path / name) for name in names]
            if not names:
                problems.append(f"{field}: {entry} is a folder without .txt and .jsonl files (Megatron data is named by its prefix)")
        elif path.suffix in (".txt", ".jsonl") and path.is_file():
            files.append((path.name, path))
        elif path.exists():
            problems.append(f"{field}: {entry} is no .txt or .jsonl file, nor one of a .bin and .idx pair")
        else:
            problems.append(f"{field}: {entry} does not exist, nor do {prefix}.bin and {prefix}.idx; paths are relative to {Path.cwd()}")
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


def _documents(inputs: dict[str, tuple[Files, list[str]]], valid_fraction: float, seed: int) -> Iterator[tuple[str, str]]:
    """(part, text) of every document that is not blank. A lone .txt as source is cut small, so that there is something to share out."""
    for field, (files, _) in inputs.items():
        piece_size = 4000 if field == "source" and len(files) == 1 else 1 << 20
        for name, path in files:
            for number, text in enumerate(_texts(path, piece_size)):
                if text.strip():
                    yield field if field in PARTS else _part_of(f"{seed}:{name}:{number}", valid_fraction), text


def _part_of(name: str, valid_fraction: float) -> str:
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "calibration" if share < valid_fraction else "valid" if share < 2 * valid_fraction else "train"


def _texts(path: Path, piece_size: int) -> Iterator[str]:
    """Documents of a file: the records of .jsonl, else its pieces, of which most files have one; none of a .py that is not UTF-8."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from _records(file, path) if path.suffix == ".jsonl" else _pieces(file, piece_size)
    except UnicodeDecodeError as error:
        if path.suffix != ".py":
            raise InputError(f"{path} is not UTF-8 text ({error.reason}); convert it, for example with iconv") from error


def _records(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            text = None
            with suppress(ValueError, KeyError, TypeError):
                text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise InputError(f'{path} line {number} is no JSON object with a string in the field "text": {line[:80].strip()!r}')
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


def _prefixes(folder: Path, part: str) -> list[str]:
    """Absolute prefixes of a part; one that is absolute in parts.json stays as it is."""
    return [str(folder.resolve() / prefix) for prefix in json.loads((folder / PARTS_FILE).read_text())[part]]


def _check_ids(prefix: str, vocab_size: int) -> None:
    """InputError when the first or last 4 Mi tokens (all, when there are fewer) hold an id that the tokenizer lacks."""
    ids, many = np.memmap(prefix + ".bin", _index(prefix)[1], mode="r"), 1 << 22
    largest = max(ids[:many].max(), ids[-many:].max())
    if largest >= vocab_size:
        raise InputError(f"{prefix} holds token id {largest}, the tokenizer has ids up to {vocab_size - 1}; tokenize the text again, or set data.tokenizer")


def _index(prefix: str) -> tuple[int, np.dtype]:
    """Number of tokens and their dtype; InputError when the pair of files is damaged, empty or incomplete."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        size = Path(prefix + ".bin").stat().st_size
        dataset = IndexedDataset(prefix)  # needs a name: its arrays point into a map of the file that goes with it
        num_tokens, dtype = int(dataset.sequence_lengths.sum()), np.dtype(dataset.index.dtype)
    except (AssertionError, ValueError, OSError) as error:
        raise InputError(f"{prefix}.bin and .idx are no Megatron indexed dataset ({error}); make or copy them again") from error
    if not 0 < num_tokens * dtype.itemsize <= size:
        raise InputError(f"{prefix}.bin has {size} bytes, its index tells of {num_tokens} tokens of {dtype.itemsize} bytes; make or copy it again")
    return num_tokens, dtype
