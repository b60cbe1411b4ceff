"""A document of sections, and the two ways it is written: Markdown, and one HTML file that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import count, groupby

from markupsafe import Markup, escape

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Table:
    """First column left, the others right. align: right or left of the columns after the first."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str = "right"


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Figure:
    """svg: the element, without an XML head. text: what it shows, for those who cannot see it. wide: as wide as the page."""

    title: str
    svg: str
    text: str
    wide: bool = False


Part = str | Table | Code | Figure
"""A str is a paragraph, in which `words in backticks` are code."""


@dataclass(frozen=True)
class Section:
    title: str
    parts: Sequence[Part]
    name: str = field(init=False)
    """Anchor."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", re.sub(r"\W+", "-", self.title.lower()))


@dataclass(frozen=True)
class Document:
    title: str
    lead: str
    sections: Sequence[Section]


def markdown(document: Document) -> str:
    """The document without its figures."""
    blocks = [f"# {document.title}", document.lead]
    for section in document.sections:
        shown = [_markdown(part) for part in section.parts if not isinstance(part, Figure)]
        blocks += [f"## {section.title}", *shown] if shown else []
    return "\n\n".join(blocks) + "\n"


def markdown_table(table: Table) -> str:
    """The first column left, the others as the table says."""
    lines = [
        list(table.header),
        ["---", *["---:" if table.align == "right" else "---"] * (len(table.header) - 1)],
        *map(list, table.rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown(part: str | Table | Code) -> str:
    if isinstance(part, Table):
        return markdown_table(part)
    return f"```\n{part.text.rstrip()}\n```" if isinstance(part, Code) else part


def html(document: Document) -> str:
    """One file: styles and figures inside, no scripts, no fonts, nothing from elsewhere."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["inline"] = _inline
    template = environment.from_string((files("minitron_mp.report") / TEMPLATE).read_text(encoding="utf-8"))
    # Figures that follow one another share a row where there is room.
    sections = [
        (s, [(kind.__name__, list(parts)) for kind, parts in groupby(s.parts, type)])
        for s in document.sections
    ]
    numbers = count(1)
    return template.render(
        document=document, sections=sections, svg=lambda figure: _with_own_ids(figure.svg, next(numbers))
    )


def _with_own_ids(svg: str, number: int) -> Markup:
    """Ids are for the whole page, and matplotlib names alike what is alike in two figures."""
    return Markup(re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>figure{number}-", svg))


def _inline(text: str) -> Markup:
    """`code` in a paragraph or a cell."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
