"""Helpers for all figures: style, axes of a fixed size, and the conversion to SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas

from minitron_mp.report.document import Figure

INK = "#1b1f24"
SOFT = "#57606a"
KEPT = "#0b57a4"
PRUNED = "#b35900"

HATCHED: dict[str, Any] = {"facecolor": "#f3dfcc", "edgecolor": PRUNED, "hatch": "///"}
"""Style of an area that marks pruned units or layers."""

STYLE: Any = {
    "svg.fonttype": "none",  # text is not converted to paths
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

SMALL = (3.9, 2.7)
"""Width and height in inches."""

HEAT_MAP = (3.9, 3.3)
"""Width and height in inches."""

WIDE = (9.4, 2.6)
"""Width and height in inches."""


@dataclass(frozen=True)
class Drawing:
    """A figure while it is drawn. text: a sentence that describes it."""

    canvas: Canvas
    axes: Axes
    title: str
    text: str
    wide: bool

    def finish(self) -> Figure:
        """Return the figure as SVG."""
        return Figure(self.title, svg_of(self.canvas, f"{self.title}. {self.text}"), self.text, self.wide)


@contextmanager
def drawing(
    title: str, text: str, size: tuple[float, float] = SMALL, *, wide: bool = False
) -> Iterator[Drawing]:
    """Yield axes to draw on, under the style of the report."""
    canvas = Canvas(figsize=size)
    width, height = size
    # Fixed margins in inches, because a layout engine would draw each figure four times.
    margins = {
        "left": 0.5 / width,
        "right": 1 - 0.12 / width,
        "bottom": 0.45 / height,
        "top": 1 - 0.28 / height,
    }
    with matplotlib.rc_context(STYLE):
        yield Drawing(canvas, canvas.subplots(gridspec_kw=margins), title, text, wide)


def note_above(ax: Axes, text: str, x: float) -> None:
    """Write a note above the axes, centred at x; right-aligned near the right edge."""
    low, high = ax.get_xlim()
    is_near_edge = (x - low) / (high - low) > 0.8
    ax.annotate(
        text,
        (x, 1.01),
        xycoords=("data", "axes fraction"),
        ha="right" if is_near_edge else "center",
        va="bottom",
        color=PRUNED,
    )


def svg_of(canvas: Canvas, label: str) -> str:
    """Return the <svg> element of a canvas, with a label for screen readers."""
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
