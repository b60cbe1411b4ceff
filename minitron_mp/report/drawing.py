"""How figures of the report look: colours, sizes, and SVG to stand inside a page.

Nothing depends on colour alone: what is cut is hatched or marked, lines have labels, and every
figure has a sentence with the same content.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas

from minitron_mp.report.document import Figure

INK, SOFT, KEPT, CUT = "#1b1f24", "#57606a", "#0b57a4", "#b35900"

HATCHED: dict[str, Any] = {"facecolor": "#f3dfcc", "edgecolor": CUT, "hatch": "///"}

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "minitron",  # the same numbers give the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "axes.titlecolor": SOFT,
    "axes.titlepad": 5,
    "axes.labelpad": 2,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e8ec",
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6,
}

SMALL, HEAT, WIDE = (3.9, 2.7), (3.9, 3.3), (9.4, 2.6)
"""Inches."""


def note_above(ax: Any, text: str, x: float) -> None:
    """Above the axes, centred at x, or ending there where the right edge is near."""
    low, high = ax.get_xlim()
    near = (x - low) / (high - low) > 0.8
    ax.annotate(
        text,
        (x, 1.01),
        xycoords=("data", "axes fraction"),
        ha="right" if near else "center",
        va="bottom",
        color=CUT,
    )


@contextmanager
def drawing(
    title: str, text: str, size: tuple[float, float] = SMALL, *, wide: bool = False
) -> Iterator[tuple[Any, Callable[[], Figure]]]:
    """Axes to draw on, and what makes a Figure of them afterwards."""
    canvas = Canvas(figsize=size)
    width, height = size
    with matplotlib.rc_context(STYLE):
        # The same margins everywhere, in inches: a layout engine would draw each figure four times.
        margins = {
            "left": 0.5 / width,
            "right": 1 - 0.12 / width,
            "bottom": 0.45 / height,
            "top": 1 - 0.28 / height,
        }
        yield (
            canvas.subplots(gridspec_kw=margins),
            lambda: Figure(title, _svg(canvas, f"{title}. {text}"), text, wide),
        )


def _svg(canvas: Canvas, label: str) -> str:
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        FigureCanvasSVG(canvas)
        canvas.savefig(
            out,
            format="svg",
            dpi=144,
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (width|height|xmlns|xmlns:xlink|version)="[^"]*"', "", svg, count=5)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1).strip()
