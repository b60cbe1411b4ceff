"""Speed of the stage data with 1 and 2 workers, beside the tokenizer itself, in one run.

    python benchmarks/tokenize_text.py out/quickstart/teacher_hf
    python benchmarks/tokenize_text.py TOKENIZER --text corpus/*.jsonl --cores 1 2 8

For each number of cores N the process may use N cores. Three rows are measured:
    encode_batch  tokenizers.encode_batch with N threads, encodings alone: no ids, no files
    ids           tokenizers.encode_batch_fast with N threads, and its ids: the limit of any program
    stage data    N workers with one thread each: read the files, tokenize, write all shards, and put
                  them together; with the start of the workers
The rows alternate, and the median of each is printed. Without --text, the text is the Python source of
the environment, copied into files of 1 MB. At the end the time to fingerprint the text is printed, at
the first start and at a second one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from minitron_mp.artifacts.output_lock import locked
from minitron_mp.config.data import DataConfig
from minitron_mp.data import file_hashes, shards
from minitron_mp.data.corpus import finish_corpus, open_text_of
from minitron_mp.data.shards import ShardStore, divide
from minitron_mp.data.sources import corpus_fingerprint
from minitron_mp.data.tokenizer import load_tokenizer
from minitron_mp.data.workers import make_shards

FILE_BYTES = 1_000_000
SHARDS = 12
"""Shards of the text. Enough that workers end at about the same time."""

ENCODE = """
import sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = [open(path, encoding="utf-8").read() for path in sys.argv[3:]]
pieces = [text[i : i + 50_000] for text in texts for i in range(0, len(text), 50_000)]
tokenizer.encode_batch(pieces[:2])
start = time.perf_counter()
for first in range(0, len(pieces), 40):
    batch = pieces[first : first + 40]
    if sys.argv[2] == "encode_batch":
        tokenizer.encode_batch(batch, add_special_tokens=False)
    else:
        [row.ids for row in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
print(time.perf_counter() - start)
"""
"""A program that encodes the texts of files. Its own process, because the threads of the library
tokenizers cannot be changed afterwards."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path, help="Hugging Face folder with tokenizer.json")
    parser.add_argument("--text", type=Path, nargs="+", help="text files; default: Python source")
    parser.add_argument("--megabytes", type=float, default=24, help="of the default text")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = args.text or write_python_source(folder / "text", int(args.megabytes * 1e6))
        measure(folder, args.tokenizer, files, args.cores, args.repeats)
        fingerprint_times(folder, files)


def write_python_source(folder: Path, num_bytes: int) -> list[Path]:
    """Write Python source of the environment into .txt files, and return them."""
    folder.mkdir()
    files: list[Path] = []
    text: list[str] = []
    size = 0
    for path in sorted(Path(os.__file__).parent.rglob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        text.append(source)
        size += len(source.encode())
        if size >= FILE_BYTES:
            files.append(folder / f"{len(files):04}.txt")
            files[-1].write_text("\n\n".join(text), encoding="utf-8")
            text = []
            size = 0
        if len(files) * FILE_BYTES >= num_bytes:
            break
    return files


def measure(folder: Path, tokenizer: Path, files: list[Path], cores: list[int], repeats: int) -> None:
    """Print a table of tokens and megabytes per second."""
    num_bytes = sum(path.stat().st_size for path in files)
    shards.SHARD_BYTES = max(1, num_bytes // SHARDS)
    all_cpus = sorted(os.sched_getaffinity(0))
    num_tokens = 0
    print(f"{len(files)} files, {num_bytes / 1e6:.1f} MB, {len(all_cpus)} cores, {repeats} repeats")
    print(f"{'cores':>5}  {'':<13} {'seconds':>8} {'tokens/s':>11} {'MB/s':>6}")
    for count in cores:
        if count > len(all_cpus):
            print(f"{count:>5}  this process may use {len(all_cpus)} cores only")
            continue
        os.sched_setaffinity(0, all_cpus[:count])
        rows: dict[str, list[float]] = {"encode_batch": [], "ids": [], "stage data": []}
        for _ in range(repeats):
            for name in ("encode_batch", "ids"):
                rows[name].append(encode_seconds(name, tokenizer, files, count))
            seconds, num_tokens = stage_seconds(folder, tokenizer, files, count)
            rows["stage data"].append(seconds)
        os.sched_setaffinity(0, all_cpus)
        for name, times in rows.items():
            seconds = statistics.median(times)
            speed = f"{num_tokens / seconds:>11,.0f} {num_bytes / seconds / 1e6:>6.2f}"
            print(f"{count:>5}  {name:<13} {seconds:>8.2f} {speed}")


def encode_seconds(name: str, tokenizer: Path, files: list[Path], num_threads: int) -> float:
    """Return the time in which the library tokenizers encodes the texts, without its start."""
    environment = os.environ | {
        "RAYON_NUM_THREADS": str(num_threads),
        "TOKENIZERS_PARALLELISM": "true" if num_threads > 1 else "false",
    }
    command = [sys.executable, "-c", ENCODE, str(tokenizer / "tokenizer.json"), name, *map(str, files)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def stage_seconds(folder: Path, tokenizer: Path, files: list[Path], num_workers: int) -> tuple[float, int]:
    """Return the time of the stage data with workers, and the number of tokens."""
    data = DataConfig(source=[str(path) for path in files])
    loaded = load_tokenizer(tokenizer)
    output = folder / "out"
    output.mkdir(exist_ok=True)
    start = time.perf_counter()
    text = open_text_of(data, loaded, 1, output=output)
    store = ShardStore(output / "shards", text.job, "")
    divided = divide(text.files)
    make_shards(store, divided, num_workers)
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=folder) as merged:
        counts = finish_corpus(text, store.put_together(divided, Path(merged)), Path(merged))
    seconds = time.perf_counter() - start
    store.discard()
    return seconds, sum(counts.values())


def fingerprint_times(folder: Path, files: list[Path]) -> None:
    """Print the time of the fingerprint of the text at the first and the second start."""
    file_hashes.SETTLED_NS = 0  # the text may have just been written
    data = DataConfig(source=[str(path) for path in files])
    output = folder / "fingerprint"
    output.mkdir()

    def timed(action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    with locked(output):
        first = timed(lambda: corpus_fingerprint(data, output=output))
        second = timed(lambda: corpus_fingerprint(data, output=output))
    print(f"fingerprint of the text: {first:.3f} s at the first start, {second:.3f} s at the second")


if __name__ == "__main__":
    main()
