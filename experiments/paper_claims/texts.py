"""Text of the experiments: what is trained on, what is held out, and last words to guess made from the latter."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from minitron_mp import InputError

HELD_OUT = 0.2
"""Share of the standard library's top-level modules and packages that is held out."""
WORDS = 50
"""Of a passage at least, before its last word is asked for."""
END = re.compile(r"(?<=[.!?])[\"')\]]*\s|\n")


@functools.cache
def stdlib_by_package(folder: Path) -> tuple[Path, Path]:
    """(train.jsonl, valid.jsonl): the Python standard library's sources, no top-level module or package in both, as most have authors of their own."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    parts: dict[str, list[str]] = {"train": [], "valid": []}
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        top = name.split("/")[0].removesuffix(".py").lstrip("_")
        held_out = int(hashlib.sha256(top.encode()).hexdigest()[:8], 16) / 2**32 < HELD_OUT
        if not skip.intersection(name.split("/")) and (text := _utf8(root / name)):
            parts["valid" if held_out else "train"].append(json.dumps({"text": text}))
    folder.mkdir(parents=True, exist_ok=True)
    for part, lines in parts.items():
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl", folder / "valid.jsonl"


@functools.cache
def last_words(source: Path, output: Path, count: int) -> Path:
    """Passages of `source` whose last word has come before, evenly from all of it, as a task of last words (minitron_mp/tasks.py).

    After LAMBADA (arXiv 1606.06031), where people can guess the word from the passage; here nobody has checked that.
    """
    passages = [passage for text in documents(source) for passage in _passages(text)]
    if len(passages) < count:
        raise InputError(
            f"{source} holds {len(passages)} passages of {WORDS} words whose last word has come before, {count} are wanted; give more held-out text"
        )
    picked = [passages[i * len(passages) // count] for i in range(count)]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in picked))
    return output


def documents(source: Path) -> Iterator[str]:
    """Texts of a .txt or .jsonl file, or of all of them in a folder."""
    files = (
        sorted(path for path in source.rglob("*") if path.suffix in (".txt", ".jsonl"))
        if source.is_dir()
        else [source]
    )
    for path in files:
        if path.suffix == ".jsonl":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if line.strip():
                    yield _text_of(line, f"{path} line {number}")
        else:
            yield path.read_text(encoding="utf-8")


def _text_of(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
        if isinstance(text, str):
            return text
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{where} is no JSON with a string `text`: {line[:80]!r}")


def _passages(text: str) -> Iterator[str]:
    """Up to the first end of a sentence or line that fits; then on from there."""
    start = 0
    for end in END.finditer(text):
        words = text[start : end.start()].split()
        if len(words) <= WORDS:
            continue
        last = words[-1].rstrip(".,;:!?)]}\"'")
        if len(last) > 3 and last.isalpha() and last in words[:-1]:
            yield text[start : text.rindex(last, start, end.start()) + len(last)].strip()
            start = end.end()
        elif len(words) > 2 * WORDS:
            start = end.end()


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        return ""
