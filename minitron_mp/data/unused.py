"""Text that is not used, or not used as it is: counts with names, for the log and the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from minitron_mp.artifacts.files import read_json, write_text
from minitron_mp.data.record_fields import Fields

TEXT_FILE = "text.json"
"""File in the folder of the tokenized text with these counts."""

MAX_NAMES = 20
"""Number of names that are kept for each reason."""

SHOWN_NAMES = 4
"""Number of names in a line of the log."""

OTHER_KIND = "files of other kinds"
HIDDEN = "hidden files and folders"
OUTPUT = "output folders of minitron-mp"
REPEATED = "files and folders that are listed twice, which are read once"
LOOP = "links to a folder that contains them"
SPECIAL = "pipes, sockets and devices"
PACKED = "packed files beside their unpacked form, which is read"
EMPTY = "empty files"
BLANK = "blank documents"
NOT_UTF8 = "Python files that are not UTF-8"
SURROGATE = "documents with half of a surrogate pair, which is replaced by U+FFFD"
NUL = "documents with NUL characters, which are kept"


def no_field(fields: Fields) -> str:
    """Return the reason for .json files without the fields of text and chats."""
    return f".json files whose first record has no {fields}"


def no_string(fields: Fields) -> str:
    """Return the reason for .json files with a number, an object or null instead of a text."""
    return f'.json files whose first record has no string in the field "{fields.text}"'


@dataclass
class Tally:
    """Number of cases of one reason, and the first names."""

    count: int = 0
    names: list[str] = field(default_factory=list)


@dataclass
class UnusedText:
    """Reason -> its cases. The reasons are the constants of this file, no_field() and no_string()."""

    tallies: dict[str, Tally] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count a case. Bytes of a file name that are not UTF-8 are written as \\udc80 to \\udcff."""
        name = name.encode(errors="backslashreplace").decode()
        tally = self.tallies.setdefault(reason, Tally())
        tally.count += 1
        if len(tally.names) < MAX_NAMES:
            tally.names.append(name)

    def update(self, other: UnusedText) -> None:
        """Add the cases of another object."""
        for reason, more in other.tallies.items():
            tally = self.tallies.setdefault(reason, Tally())
            tally.count += more.count
            tally.names = (tally.names + more.names)[:MAX_NAMES]

    def summary(self) -> str:
        """Return all cases in one line; "" if there are none."""
        return "; ".join(f"{reason}: {count} ({names})" for reason, count, names in self.rows())

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (reason, number of cases, first names) of each reason."""
        return [(reason, f"{tally.count:,}", _first_names(tally)) for reason, tally in self.tallies.items()]

    def save(self, folder: Path) -> None:
        """Write the cases into a folder of tokenized text."""
        cases = {
            reason: {"count": tally.count, "names": tally.names} for reason, tally in self.tallies.items()
        }
        write_text(folder / TEXT_FILE, json.dumps(cases, indent=1))


def load_unused(folder: Path) -> UnusedText:
    """Return the cases that were written into a folder of tokenized text."""
    if not (folder / TEXT_FILE).is_file():
        return UnusedText()
    cases = read_json(folder / TEXT_FILE, "data --force")
    return UnusedText({reason: Tally(**tally) for reason, tally in cases.items()})


def _first_names(tally: Tally) -> str:
    shown = tally.names[:SHOWN_NAMES]
    more = tally.count - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")
