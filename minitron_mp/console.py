"""What a person sees: tables, a progress bar on a terminal, plain lines in a log file. Rank 0 speaks."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

console = Console(highlight=False)

if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 160  # a log file: rich would wrap tables at 80

LINE_INTERVAL_S = 10.0


def speaks() -> bool:
    """Whether this process prints: rank 0 of torchrun, or the only one. Needs no torch."""
    return os.environ.get("RANK", "0") == "0"


def launched() -> bool:
    """Whether torchrun, or another launcher, started this process as a rank of a job. Needs no torch."""
    return "RANK" in os.environ


def say(text: str) -> None:
    if speaks():
        console.print(text, soft_wrap=True, markup=False)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, first column left, the others right."""
    if not speaks():
        return
    grid = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        grid.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


class Tracker:
    """Progress of one long piece of work, with speed and time left: a bar on a terminal, a line every 10 s elsewhere.

    A context manager; on ranks that do not speak it does nothing. first: what was done before, which tells nothing of the speed.
    """

    def __init__(self, title: str, total: int, unit: str, first: int = 0):
        self.title, self.total, self.unit, self.first, self.done = title, total, unit, first, first
        self.bar: Any = None

    def __enter__(self) -> Tracker:
        self.start = self.last = time.monotonic()
        if speaks() and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(10),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
            )
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            note = TextColumn(
                "{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True)
            )  # on a narrow terminal this is what is cut
            self.bar = Progress(*columns, *times, note, console=console, expand=True)
            self.bar.start()
            self.task = self.bar.add_task(
                self.title, total=self.total, completed=self.first, unit=self.unit, note=""
            )
        return self

    def advance(self, count: int, note: str = "") -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(self.task, advance=count, note=note)
        elif speaks() and (time.monotonic() - self.last > LINE_INTERVAL_S or self.done >= self.total):
            self.last = time.monotonic()
            seconds = self.last - self.start
            now = self.done - self.first
            left = seconds / now * max(0, self.total - self.done)
            speed = f"{now / seconds:,.1f} {self.unit}/s" if seconds > 0 else ""
            console.print(
                f"{self.title}: {self.done}/{self.total} {self.unit}, {speed}, {_clock(left)} left  {note}",
                soft_wrap=True,
                markup=False,
            )

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
