"""Text files of a folder. Links are followed, and each file is listed once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minitron_mp.artifacts.files import RUN_LOG
from minitron_mp.data import unused
from minitron_mp.data.record_errors import NoField, NoString
from minitron_mp.data.record_fields import Fields
from minitron_mp.data.records import TooLong, check_first_record
from minitron_mp.data.text_files import format_of, unpacked_name
from minitron_mp.data.unused import UnusedText
from minitron_mp.errors import InputError

RUN_LOG_BEGINNING = b'{"stage":"'

SHOWN_PROBLEMS = 5
"""Number of files with problems that are shown of one text."""


@dataclass
class FileLister:
    """Lists the text files of one field of the recipe. It counts what it leaves out."""

    name: str
    """Name of the field, for problems."""
    fields: Fields
    """Fields of records. A .json file is text if its first record has one of them."""
    output: Path | None
    """Output folder of the run, which is not read."""
    problems: list[str]
    """Sentences about files that cannot be read are added to this list."""
    unused: UnusedText = field(default_factory=UnusedText)
    """What the last folder left out."""
    not_text: dict[str, NoField] = field(default_factory=dict)
    """Path -> error of the first record: .json files of the last folder without text."""
    _seen_files: set[object] = field(default_factory=set)
    _seen_folders: set[str] = field(default_factory=set)
    _found: list[tuple[str, Path]] = field(default_factory=list)
    _links: list[tuple[str, Path]] = field(default_factory=list)
    _invalid: list[str] = field(default_factory=list)

    def folder(self, folder: Path) -> list[tuple[str, Path]]:
        """Return (relative name, path) of each text file of a folder, sorted by name.

        A name does not contain the suffix of the packing, so a text belongs to the same part,
        packed or not. Files and folders come before links to them, so that the name of a text does
        not depend on links.
        """
        self._found = []
        self._links = []
        self._invalid = []
        self.unused = UnusedText()
        self.not_text = {}
        self._scan("", folder)
        while self._links:
            self._links.sort(reverse=True)
            self._follow(*self._links.pop())
        self.problems += [f"{self.name}: {problem}" for problem in self._invalid[:SHOWN_PROBLEMS]]
        if len(self._invalid) > SHOWN_PROBLEMS:
            more = len(self._invalid) - SHOWN_PROBLEMS
            self.problems.append(f"{self.name}: {more:,} more .json files have such problems")
        return self._without_packed_copies()

    def file(self, path: Path) -> list[tuple[str, Path]]:
        """Return (name, path) of a file in a list, or [] if it was listed before."""
        if not self._is_new(path, os.path.realpath(path)):
            return []
        return [(unpacked_name(path.name), path)]

    def _scan(self, prefix: str, folder: Path) -> None:
        """Add the files and links of a folder and of its subfolders, depth first."""
        # A stack of the unread entries of each folder: folders may be nested deeper than calls.
        pending = [self._entries(prefix, folder)]
        while pending:
            relative, path = next(pending[-1], ("", None))
            if path is None:
                pending.pop()
            elif self._is_new_folder(path):
                pending.append(self._entries(f"{relative}/", path))

    def _entries(self, prefix: str, folder: Path) -> Iterator[tuple[str, Path]]:
        """Add the files and links of a folder, and yield (relative name, path) of its subfolders."""
        real_folder = os.path.realpath(folder)
        self._seen_folders.add(real_folder)
        try:
            with os.scandir(folder) as iterator:
                entries = sorted(iterator, key=lambda entry: entry.name)
        except OSError as error:
            self.problems.append(
                f"{self.name}: {folder} cannot be read: {error.strerror}; make it readable, or move it"
            )
            return
        for entry in entries:
            relative, path = prefix + entry.name, folder / entry.name
            if entry.name.startswith("."):
                self.unused.add(unused.HIDDEN, str(path))
            elif entry.is_symlink():
                self._links.append((relative, path))
            elif entry.is_dir():
                yield relative, path
            elif entry.is_file():
                self._file(relative, path, os.path.join(real_folder, entry.name))
            else:
                self.unused.add(unused.SPECIAL, str(path))

    def _is_new_folder(self, path: Path) -> bool:
        """Return whether a subfolder is to be read. One that is not is counted."""
        if os.path.realpath(path) in self._seen_folders:
            self.unused.add(unused.REPEATED, str(path))
        elif is_output(path, self.output):
            self.unused.add(unused.OUTPUT, str(path))
        else:
            return True
        return False

    def _follow(self, relative: str, path: Path) -> None:
        """Add the file or the folder that a link leads to."""
        try:
            path.stat()
        except OSError as error:  # also for a link to itself
            self.problems.append(
                f"{self.name}: {path} is a link to {os.readlink(path)}, which cannot be read "
                f"({error.strerror}); correct or delete the link"
            )
            return
        target, parent = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
        if path.is_file():
            self._file(relative, path, str(target))
        elif not path.is_dir():
            self.unused.add(unused.SPECIAL, str(path))
        elif target == parent or target in parent.parents:
            self.unused.add(unused.LOOP, str(path))
        elif self._is_new_folder(path):
            self._scan(f"{relative}/", path)

    def _file(self, relative: str, path: Path, real_path: str) -> None:
        if not self._is_text(path):
            return
        if self._is_new(path, real_path):
            self._found.append((relative, path))
        else:
            self.unused.add(unused.REPEATED, str(path))

    def _is_text(self, path: Path) -> bool:
        """Return whether a file is text, by its name and, for .json, by its first record.

        A file that is not text is counted. A .json file that cannot be read is a problem.
        """
        file_format = format_of(path.name)
        if file_format == "json":
            try:
                check_first_record(path, self.fields)
            except NoField as error:
                reason = unused.no_string if isinstance(error, NoString) else unused.no_field
                self.unused.add(reason(self.fields), str(path))
                self.not_text.setdefault(str(path), error)
                return False
            except TooLong:
                file_format = None
            except InputError as error:
                self._invalid.append(str(error))
                return False
        if file_format is None:
            self.unused.add(unused.OTHER_KIND, str(path))
        return file_format is not None

    def _is_new(self, path: Path, real_path: str) -> bool:
        """Return whether a file was not listed before, and remember it."""
        status = path.stat()
        # Some network file systems have unreliable inode numbers, so they count only for hard links.
        identity = (status.st_dev, status.st_ino) if status.st_nlink > 1 else real_path
        if identity in self._seen_files:
            return False
        self._seen_files.add(identity)
        return True

    def _without_packed_copies(self) -> list[tuple[str, Path]]:
        """Return the files with unpacked names, without a.jsonl.gz if there is a.jsonl."""
        files: dict[str, Path] = {}
        for relative, path in sorted(self._found):
            name = unpacked_name(relative)
            if name in files:
                self.unused.add(unused.PACKED, str(path))
            else:
                files[name] = path
        return sorted(files.items())


def is_output(folder: Path, output: Path | None) -> bool:
    """Return whether a folder is `output`, or the output folder of another run."""
    if is_same(folder, output):
        return True
    try:
        with (folder / RUN_LOG).open("rb") as file:
            return file.read(len(RUN_LOG_BEGINNING)) == RUN_LOG_BEGINNING
    except OSError:
        return False


def is_same(folder: Path, output: Path | None) -> bool:
    """Return whether a folder is `output`, also through links."""
    return output is not None and os.path.realpath(folder) == os.path.realpath(output)
