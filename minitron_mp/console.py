"""Console output: tables, a progress bar on a terminal, plain lines in a log file.

Only rank 0 prints.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

console = Console(highlight=False)

if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 160  # a log file: rich would wrap tables at 80

LINE_INTERVAL_S = 10.0
"""Least time between two progress lines in a log file."""


def speaks() -> bool:
    """Return whether this process prints: rank 0, or a process without a launcher.

    It does not import torch.
    """
    return os.environ.get("RANK", "0") == "0"


def launched() -> bool:
    """Return whether torchrun or another launcher started this process as a rank of a job.

    It does not import torch.
    """
    return "RANK" in os.environ


def rank_name() -> str:
    """Return "rank N" for messages of ranks other than 0."""
    return f"rank {os.environ.get('RANK', '0')}"


@contextmanager
def standard_output() -> Iterator[None]:
    """Add the name of the output to an OSError of printing, such as of a full disk."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def say(text: str) -> None:
    """Print a line on rank 0."""
    if speaks():
        with standard_output():
            console.print(text, soft_wrap=True, markup=False)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on rank 0. The first column is aligned left, all other columns right."""
    if not speaks():
        return
    grid = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        grid.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        grid.add_row(*row)
    with standard_output():
        console.print(grid)


class Tracker:
    """Progress of a long operation, with speed and remaining time; a context manager.

    On a terminal it shows a bar. In a log file it prints a line every LINE_INTERVAL_S. It prints
    nothing on ranks other than 0. first: units that an earlier run has finished. The speed does not
    include them.
    """

    def __init__(self, title: str, total: int, unit: str, first: int = 0):
        self.title = title
        self.total = total
        self.unit = unit
        self.first = first
        self.done = first
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def __enter__(self) -> Tracker:
        self.start = time.monotonic()
        self.last = self.start
        if speaks() and console.is_terminal:
            self.bar = self._new_bar()
            self.bar.start()
            self.task = self.bar.add_task(
                self.title, total=self.total, completed=self.first, unit=self.unit, note=""
            )
        return self

    def _new_bar(self) -> Progress:
        # A narrow terminal truncates the note first.
        note = TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True))
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            note,
            console=console,
            expand=True,
        )

    def advance(self, count: int, note: str = "") -> None:
        """Add finished units to the progress. note: text that is shown after the speed."""
        self.done += count
        if self.bar is not None:
            self.bar.update(self.task, advance=count, note=note)
            return
        is_due = time.monotonic() - self.last > LINE_INTERVAL_S or self.done >= self.total
        if speaks() and is_due:
            self._print_line(note)

    def _print_line(self, note: str) -> None:
        self.last = time.monotonic()
        seconds = self.last - self.start
        finished = self.done - self.first
        remaining_s = seconds / finished * max(0, self.total - self.done)
        speed = f"{finished / seconds:,.1f} {self.unit}/s" if seconds > 0 else ""
        say(
            f"{self.title}: {self.done}/{self.total} {self.unit}, {speed}, {_clock(remaining_s)} left  {note}"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
