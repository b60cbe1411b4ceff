"""A document of sections, written as Markdown or as one self-contained HTML file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import count, groupby
from typing import Literal

from markupsafe import Markup, escape

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Table:
    """A table whose first column is aligned left."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: Literal["left", "right"] = "right"
    """Alignment of the columns after the first."""


@dataclass(frozen=True)
class Code:
    """Preformatted text in a box."""

    text: str


@dataclass(frozen=True)
class Figure:
    """A figure of the HTML page. Markdown output has no figures."""

    title: str
    svg: str
    """The <svg> element, without an XML declaration."""
    text: str
    """Description of the figure, for readers who cannot see it."""
    wide: bool = False
    """Whether the figure is as wide as the page."""


Part = str | Table | Code | Figure
"""A str is a paragraph; `words in backticks` are code."""


@dataclass(frozen=True)
class Section:
    """A heading and its parts."""

    title: str
    parts: Sequence[Part]
    name: str = field(init=False)
    """Anchor in the HTML page."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", re.sub(r"\W+", "-", self.title.lower()))


@dataclass(frozen=True)
class Document:
    """A page. lead: the paragraph under its title."""

    title: str
    lead: str
    sections: Sequence[Section]


def markdown(document: Document) -> str:
    """Render the document as Markdown, without its figures."""
    blocks = [f"# {document.title}", document.lead]
    for section in document.sections:
        shown = [_markdown(part) for part in section.parts if not isinstance(part, Figure)]
        blocks += [f"## {section.title}", *shown] if shown else []
    return "\n\n".join([*blocks, "<!-- written by minitron-mp -->"]) + "\n"


def markdown_table(table: Table) -> str:
    """Render a table as Markdown."""
    rule = "---:" if table.align == "right" else "---"
    rules = ["---", *(rule for _ in table.header[1:])]
    lines = [list(table.header), rules, *map(list, table.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown(part: str | Table | Code) -> str:
    if isinstance(part, Table):
        return markdown_table(part)
    if isinstance(part, Code):
        return f"```\n{part.text.rstrip()}\n```"
    return part


def html(document: Document) -> str:
    """Render the document as one HTML file with styles and figures, without scripts or external
    resources.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["inline"] = _inline
    template = environment.from_string((files("minitron_mp.report") / TEMPLATE).read_text(encoding="utf-8"))
    sections = []
    for section in document.sections:
        # Consecutive figures share a row if there is room.
        groups = [(kind.__name__, list(parts)) for kind, parts in groupby(section.parts, type)]
        sections.append((section, groups))
    numbers = count(1)
    return template.render(
        document=document, sections=sections, svg=lambda figure: _with_unique_ids(figure.svg, next(numbers))
    )


def _with_unique_ids(svg: str, number: int) -> Markup:
    """Prefix all ids: matplotlib uses the same id for equal elements of two figures."""
    return Markup(re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>figure{number}-", svg))


def _inline(text: str) -> Markup:
    """Render `code` in a paragraph or a cell."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
