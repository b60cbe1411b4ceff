"""Files of the user's text: the files and Megatron data that a recipe lists, and their fingerprint.

This file imports neither torch nor Megatron.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from minitron_mp.artifacts.files import fingerprint_files
from minitron_mp.config.data import DataConfig
from minitron_mp.errors import InputError, refuse

STDLIB = "python-stdlib"

PARTS = ("calibration", "train", "valid")

TEXT_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Source:
    """Text files and Megatron data of one field of the recipe."""

    files: list[tuple[str, Path]] = field(default_factory=list)
    """(name, path) of each file. The name is relative, so it is the same after the folder moves."""
    prefixes: list[str] = field(default_factory=list)
    """Absolute prefixes of Megatron's .bin and .idx files."""


Sources = dict[str, Source]
"""Name -> its text. A name is a part, "source", "python-stdlib", or a name in data.held_out."""


def find_sources(data: DataConfig, held_out: bool = False) -> Sources:
    """Return the text of each part if the parts are listed, else of "source" or "python-stdlib".

    held_out: return the text of each name in data.held_out instead. InputError lists all paths that
    cannot be used.
    """
    problems: list[str] = []
    if held_out:
        sources = {
            name: _resolve(entries, f"data.held_out.{name}", problems)
            for name, entries in data.held_out.items()
        }
    elif data.train:
        sources = {part: _resolve(getattr(data, part), f"data.{part}", problems) for part in PARTS}
    elif data.source in (STDLIB, [STDLIB]):
        sources = {STDLIB: Source(_stdlib_files())}
    else:
        entries = [data.source] if isinstance(data.source, str) else data.source
        sources = {"source": _resolve(entries, "data.source", problems)}
    refuse("text that cannot be used:", problems)
    return sources


def corpus_problems(data: DataConfig) -> list[str]:
    """Return a sentence for each path of the recipe's text that cannot be used."""
    try:
        find_sources(data)
        find_sources(data, held_out=True)
    except InputError as error:
        return [row.removeprefix("  - ") for row in str(error).splitlines()[1:]]
    return []


def corpus_fingerprint(data: DataConfig, held_out: bool = False) -> str:
    """Return the fingerprint of the text: of the files, or of the version of the standard library.

    The tokenizer is not part of it. held_out: return the fingerprint of data.held_out.
    """
    rows = []
    for name, source in find_sources(data, held_out).items():
        paths = [path for _, path in source.files]
        for prefix in source.prefixes:
            paths += [Path(prefix + ".bin"), Path(prefix + ".idx")]
        if name == STDLIB:
            num_bytes = sum(path.stat().st_size for path in paths)
            rows.append(f"{STDLIB} {platform.python_version()}: {len(paths)} files, {num_bytes} bytes")
        else:
            # The name of a document decides its part, so the fingerprint contains names.
            names = repr([file_name for file_name, _ in source.files])
            names_hash = hashlib.sha256(names.encode()).hexdigest()[:16]
            rows.append(f"{name} {names_hash} {fingerprint_files(paths)}")
    return ", ".join(rows)


def shared_parts(data: DataConfig, part: str, other_part: str) -> list[str]:
    """Return the files and Megatron prefixes that two listed parts have in common."""
    sources = find_sources(data)
    contents = []
    for source in (sources[part], sources[other_part]):
        files = {str(path.resolve()) for _, path in source.files}
        contents.append(files | set(source.prefixes))
    return sorted(contents[0] & contents[1])


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    names = sorted(path.as_posix() for path in paths if not skipped.intersection(path.parts))
    return [(name, root / name) for name in names]


def _resolve(entries: list[str], name: str, problems: list[str]) -> Source:
    """Return the text of the entries. Add a sentence to problems for each unusable entry.

    name: name of the recipe's field, for these sentences.
    """
    source = Source()
    if not entries:
        problems.append(f"{name} is empty; give files or folders of .txt and .jsonl")
    for entry in entries:
        path = Path(entry)
        prefix = entry.removesuffix(".bin").removesuffix(".idx")
        # Checked before folders: Megatron creates a folder <prefix>/cache.
        if Path(prefix + ".bin").is_file() and Path(prefix + ".idx").is_file():
            source.prefixes.append(str(Path(prefix).resolve()))
        elif path.is_dir():
            names = sorted(
                file.relative_to(path).as_posix() for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES
            )
            source.files.extend((file_name, path / file_name) for file_name in names)
            if not names:
                problems.append(
                    f"{name}: {entry} is a folder without .txt and .jsonl files; for Megatron data, give "
                    "its prefix"
                )
        elif path.suffix in TEXT_SUFFIXES and path.is_file():
            source.files.append((path.name, path))
        elif path.exists():
            problems.append(
                f"{name}: {entry} is neither .txt nor .jsonl nor part of a .bin and .idx pair; convert it"
            )
        else:
            problems.append(
                f"{name}: {entry} does not exist, nor do {prefix}.bin and {prefix}.idx; give a path "
                f"relative to {Path.cwd()}"
            )
    return source
