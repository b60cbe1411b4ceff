"""Files of the user's text: the files and Megatron data that a recipe lists, and their fingerprint.

This file imports neither torch nor Megatron.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from minitron_mp.config.data import DataConfig
from minitron_mp.data import unused
from minitron_mp.data.file_hashes import FileHashes, combined_hash
from minitron_mp.data.folders import FileLister, is_output, is_same
from minitron_mp.data.indexed_files import has_mask, mask_prefix
from minitron_mp.data.record_errors import NoField
from minitron_mp.data.record_fields import Fields
from minitron_mp.data.text_files import FORMATS_NOTE, format_of
from minitron_mp.data.unused import UnusedText
from minitron_mp.errors import refuse

STDLIB = "python-stdlib"

WILDCARDS = frozenset("*?[")

PARTS = ("calibration", "train", "valid")


@dataclass(frozen=True)
class Source:
    """Text files and Megatron data of one field of the recipe."""

    files: list[tuple[str, Path]] = field(default_factory=list)
    """(name, path) of each file. The name is relative, so it is the same after the folder moves."""
    prefixes: list[str] = field(default_factory=list)
    """Absolute prefixes of Megatron's .bin and .idx files."""
    unused: UnusedText = field(default_factory=UnusedText)
    """Files and folders that are not read."""


@dataclass(frozen=True)
class TextFile:
    """A text file, or Megatron data that is divided by document."""

    source: str
    """Name of its source."""
    name: str
    """Relative name, which decides the parts of its documents."""
    path: Path
    """The file, or the prefix of Megatron data."""
    is_tokenized: bool = False

    @property
    def is_divided(self) -> bool:
        """Whether its documents are divided among the parts."""
        return self.source in ("source", STDLIB)

    @property
    def files(self) -> list[Path]:
        """The files on disk."""
        return megatron_files(str(self.path)) if self.is_tokenized else [self.path]


Sources = dict[str, Source]
"""Name -> its text. A name is a part, a text of a blend (set_names()), "source", "python-stdlib", or
a name in data.held_out."""


def set_names(data: DataConfig, part: str) -> list[str]:
    """Return the names of the texts of a part: those of its blend, or the part itself."""
    shares = data.shares(part)
    return [part] if shares is None else [f"{part}_{number}" for number in range(len(shares))]


def fields_of(data: DataConfig) -> Fields:
    """Return the fields of records that are read."""
    return Fields(data.text_field, data.chat_field)


def megatron_files(prefix: str) -> list[Path]:
    """Return the files of Megatron data: .bin and .idx, and those of its loss mask if it has one."""
    prefixes = [prefix, mask_prefix(prefix)] if has_mask(prefix) else [prefix]
    return [Path(f"{each}{suffix}") for each in prefixes for suffix in (".bin", ".idx")]


def find_sources(data: DataConfig, held_out: bool = False, output: Path | None = None) -> Sources:
    """Return the text of each part if the parts are listed, else of "source" or "python-stdlib".

    held_out: return the text of each name in data.held_out instead. output: output folder of the
    run, which is not read if a folder of text contains it. InputError lists all paths that cannot
    be used.
    """
    problems: list[str] = []

    def resolve(entries: list[str], name: str) -> Source:
        return _resolve(entries, FileLister(name, fields_of(data), output, problems))

    if held_out:
        sources = {name: resolve(entries, f"data.held_out.{name}") for name, entries in data.held_out.items()}
    elif data.train:
        sources = {}
        for part in PARTS:
            texts = {name: resolve(entries, f"data.{part}") for name, entries in _entries(data, part)}
            problems += _repeated_in(texts, f"data.{part}")
            sources |= texts
    elif data.source in (STDLIB, [STDLIB]):
        sources = {STDLIB: Source(_stdlib_files())}
    else:
        entries = [data.source] if isinstance(data.source, str) else data.source
        sources = {"source": resolve(entries, "data.source")}
    refuse("text that cannot be used:", problems)
    return sources


def _entries(data: DataConfig, part: str) -> list[tuple[str, list[str]]]:
    """Return (name, paths) of each text of a part."""
    texts: list[str] | dict[str, float | str] = getattr(data, part)
    if isinstance(texts, list):
        return [(part, texts)]
    return [(name, [path]) for name, path in zip(set_names(data, part), texts)]


def find_all_sources(data: DataConfig, output: Path, *, parts: bool = True, held_out: bool = True) -> Sources:
    """Return the text of the parts and of data.held_out.

    output: as in find_sources(). parts, held_out: False leaves out this text.
    """
    sources: Sources = find_sources(data, output=output) if parts else {}
    return sources | (find_sources(data, held_out=True, output=output) if held_out else {})


def unused_text(sources: Sources) -> UnusedText:
    """Return the files and folders of all sources that are not read."""
    total = UnusedText()
    for source in sources.values():
        total.update(source.unused)
    return total


def corpus_fingerprint(data: DataConfig, held_out: bool = False, output: Path | None = None) -> str:
    """Return the fingerprint of the text: of the files, or of the version of the standard library.

    The tokenizer is not part of it. held_out: return the fingerprint of data.held_out. output: as
    in find_sources(). Hashes of files are remembered there, so a file is read only if it changed.
    """
    hashes = FileHashes(output)
    rows = []
    for name, source in find_sources(data, held_out, output).items():
        paths = [path for _, path in source.files]
        for prefix in source.prefixes:
            paths += megatron_files(prefix)
        if name == STDLIB:
            num_bytes = sum(path.stat().st_size for path in paths)
            rows.append(f"{STDLIB} {platform.python_version()}: {len(paths)} files, {num_bytes} bytes")
        else:
            # The name of a document decides its part, so the fingerprint contains names.
            names = repr([file_name for file_name, _ in source.files])
            names_hash = hashlib.sha256(names.encode()).hexdigest()[:16]
            rows.append(f"{name} {names_hash} {combined_hash(hashes.hashes_of(paths))}")
    return ", ".join(rows)


def shared_parts(sources: Sources, data: DataConfig, part: str, other_part: str) -> list[str]:
    """Return the files and Megatron prefixes that two listed parts have in common."""
    contents = [
        set().union(*(_content(sources[name]) for name in set_names(data, listed)))
        for listed in (part, other_part)
    ]
    return sorted(contents[0] & contents[1])


def _content(source: Source) -> set[str]:
    return {str(path.resolve()) for _, path in source.files} | set(source.prefixes)


def _repeated_in(blend: Sources, key: str) -> list[str]:
    """Return a sentence for the first file of each text of a blend that an earlier text has too."""
    problems = []
    seen: set[str] = set()
    for source in blend.values():
        content = _content(source)
        repeated = sorted(content & seen)
        if repeated:
            problems.append(f"{key}: two texts of the blend have {repeated[0]}; give each text once")
        seen |= content
    return problems


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    names = sorted(path.as_posix() for path in paths if not skipped.intersection(path.parts))
    return [(name, root / name) for name in names]


def _resolve(entries: list[str], lister: FileLister) -> Source:
    """Return the text of the entries. Add a sentence to lister.problems for each unusable entry."""
    source = Source()
    name, problems = lister.name, lister.problems
    if not all(entries) or not entries:
        problems.append(f"{name} is empty; give files or folders of text ({FORMATS_NOTE})")
    for entry in filter(None, entries):
        path = Path(entry)
        prefix = entry.removesuffix(".bin").removesuffix(".idx")
        # Checked before folders: Megatron creates a folder <prefix>/cache.
        if Path(prefix + ".bin").is_file() and Path(prefix + ".idx").is_file():
            prefix = str(Path(prefix).resolve())
            if prefix in source.prefixes:
                source.unused.add(unused.REPEATED, entry)
            else:
                source.prefixes.append(prefix)
        elif path.is_dir():
            _add_folder(source, entry, lister)
        elif format_of(path.name) and path.is_file():
            files = lister.file(path)
            source.files.extend(files)
            if not files:
                source.unused.add(unused.REPEATED, entry)
        elif path.exists():
            problems.append(
                f"{name}: {entry} is neither a text file ({FORMATS_NOTE}) nor part of a .bin and .idx pair; "
                "convert it"
            )
        elif path.is_symlink():
            problems.append(
                f"{name}: {entry} is a link to {os.readlink(path)}, which cannot be read; correct the link"
            )
        elif entry == STDLIB:
            problems.append(
                f"{name}: {STDLIB} is not a file or folder and cannot be combined with other text; give it "
                "alone as data.source, or remove it"
            )
        elif WILDCARDS.intersection(entry):
            parent = next(parent for parent in path.parents if not WILDCARDS.intersection(str(parent)))
            problems.append(
                f"{name}: {entry} does not exist, and wildcards are not expanded; give the folder {parent}"
            )
        else:
            problems.append(
                f"{name}: {entry} does not exist, nor do {prefix}.bin and {prefix}.idx; give a path "
                f"relative to {Path.cwd()}"
            )
    return source


def _add_folder(source: Source, entry: str, lister: FileLister) -> None:
    if is_same(Path(entry), lister.output):
        lister.problems.append(
            f"{lister.name} and output are the same folder ({entry}); set another output, or give the folder "
            "of the text"
        )
        return
    if is_output(Path(entry), lister.output):
        lister.problems.append(
            f"{lister.name}: {entry} is an output folder of minitron-mp, whose files are not text; give a "
            "folder of text, or set another output"
        )
        return
    num_problems = len(lister.problems)
    files = lister.folder(Path(entry))
    source.files.extend(files)
    source.unused.update(lister.unused)
    is_repeated = bool(source.files) and unused.REPEATED in lister.unused.tallies
    if files or is_repeated or len(lister.problems) > num_problems:
        return
    content = lister.unused.summary()
    lister.problems.append(
        f"{lister.name}: {entry} is a folder without text files ({FORMATS_NOTE})"
        + (f"; it has {content}" if content else "")
        + _advice(lister.not_text)
        + "; for Megatron data, give its prefix"
    )


def _advice(not_text: dict[str, NoField]) -> str:
    """Return what to do if a folder has .json files without text."""
    if not not_text:
        return ""
    path, error = next(iter(not_text.items()))
    return f"; {error.advice} ({path}, its fields: {error.fields})"
