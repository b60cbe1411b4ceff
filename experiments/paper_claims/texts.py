"""Training text, held-out text, and a last-word task made from the latter."""

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
"""Held-out share of the standard library's top-level modules and packages."""
WORDS = 50
"""Minimum number of words of a passage before its last word."""
END = re.compile(r"(?<=[.!?])[\"')\]]*\s|\n")


@functools.cache
def stdlib_by_package(folder: Path) -> tuple[Path, Path]:
    """Write the standard library's sources as train.jsonl and valid.jsonl; return both paths.

    No top-level module or package is in both, because most have different authors.
    """
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
    """Write a last-word task: `count` passages whose last word occurs earlier; return output.

    The passages are spread evenly over `source`. The task follows LAMBADA (arXiv 1606.06031). In
    LAMBADA people checked that the word can be guessed. Here nobody checked it.
    """
    passages = [passage for text in documents(source) for passage in _passages(text)]
    if len(passages) < count:
        raise InputError(
            f"{source} has {len(passages)} passages of {WORDS} words whose last word occurs earlier, "
            f"{count} are needed; give more held-out text"
        )
    picked = [passages[i * len(passages) // count] for i in range(count)]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in picked))
    return output


def documents(source: Path) -> Iterator[str]:
    """Yield the texts of a .txt or .jsonl file, or of all such files in a folder."""
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
    raise InputError(f"{where} is not JSON with a string `text`: {line[:80]!r}")


def _passages(text: str) -> Iterator[str]:
    """Yield passages that end at an end of a sentence or line, one after another."""
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
