"""Figures of importance scores: curves by rank, heat maps by layer, and kept layers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.ticker import MaxNLocator, PercentFormatter

from minitron_mp.report.document import Figure
from minitron_mp.report.figures.drawing import (
    HATCHED,
    HEAT_MAP,
    INK,
    KEPT,
    PRUNED,
    SOFT,
    WIDE,
    drawing,
    note_above,
)

CURVE_POINTS = 128
"""Number of points of a curve. More points would not be visible."""

LINES = ((KEPT, "o"), ("#3f8f5f", "s"), (SOFT, "^"), (INK, "v"))
"""(colour, marker) of each axis, in order."""

HEAT_MAP_BINS = 64
"""Columns of a heat map over ranks."""

LEVELS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 4)
"""Colour levels of a heat map, in multiples of the layer's mean score."""


def kept_layers_figure(num_layers: int, shares: Mapping[str, Mapping[int, float]]) -> Figure:
    """Draw which layers are kept, and the share of each layer's importance that is kept.

    shares: axis -> kept layer -> share.
    """
    kept = sorted(next(iter(shares.values())))
    dropped = sorted(set(range(num_layers)) - set(kept))
    names = ", ".join(map(str, dropped)) or "none"
    text = f"{len(kept)} of {num_layers} layers are kept; dropped: {names}."
    with drawing("Importance kept in each layer", text, WIDE, wide=True) as figure:
        ax = figure.axes
        for layer in dropped:
            label = "layer dropped" if layer == dropped[0] else None
            ax.axvspan(layer - 0.5, layer + 0.5, **HATCHED, linewidth=0, label=label)
        for (axis, values), (colour, marker) in zip(shares.items(), itertools.cycle(LINES)):
            with_gaps = [values.get(layer, np.nan) for layer in range(num_layers)]  # dropped layers
            ax.plot(range(num_layers), with_gaps, marker, color=colour, ls="-", ms=4, lw=1.2, label=axis)
        low = min(min(values.values()) for values in shares.values())
        ax.set(
            xlim=(-0.6, num_layers - 0.4),
            ylim=(max(0.0, np.floor(low * 10 - 0.5) / 10), 1.02),
            xlabel="layer",
            title="importance kept",
        )
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=15))
        ax.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=3, borderaxespad=0)
    return figure.finish()


def score_curves(title: str, rows: Sequence[np.ndarray], keep: Sequence[int], unit: str) -> Figure:
    """Draw the scores of each row, largest first, and the cut if it is the same in all rows.

    keep: number of kept units in each kept row.
    """
    ordered = [-np.sort(-row) for row in rows]
    num_rows = len(rows)
    n = max(row.size for row in rows)
    text = f"Importance scores, largest first. {_kept_text(rows, keep)}"
    colours: Any = [KEPT]
    if num_rows > 1:
        text += " Earlier layers are darker."
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.78, num_rows))
    with drawing(title, text) as figure:
        ax = figure.axes
        width = 0.8 if num_rows > 1 else 1.6
        marker = "o" if n < 24 else None
        for row, colour in zip(ordered, colours):
            points = np.linspace(0, row.size - 1, min(row.size, CURVE_POINTS)).round().astype(int)
            ax.plot(points + 1, row[points], color=colour, lw=width, marker=marker, ms=2.5)
        if len(set(keep)) == 1 and keep[0] < n:
            ax.axvspan(keep[0] + 0.5, n + 0.5, **HATCHED, alpha=0.6, linewidth=0)
            ax.axvline(keep[0] + 0.5, color=PRUNED, lw=1.2)
            note_above(ax, f"cut after {keep[0]:,}", keep[0] + 0.5)
        smallest, largest = min(row[-1] for row in ordered), max(row[0] for row in ordered)
        if smallest > 0 and largest > 8 * smallest:
            ax.set_yscale("log")
        ax.set(xlabel=f"{unit}, by rank", title="score")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    return figure.finish()


def _kept_text(rows: Sequence[np.ndarray], keep: Sequence[int]) -> str:
    sizes = {row.size for row in rows}
    if len(sizes) > 1 or len(set(keep)) > 1:
        return f"The top {min(keep):,} to {max(keep):,} of {min(sizes):,} to {max(sizes):,} are kept."
    n = sizes.pop()
    return f"The top {keep[0]:,} of {n:,} are kept." if keep[0] < n else f"All {n:,} are kept."


def layer_bars(
    title: str, values: Mapping[int, float], dropped: Sequence[int], label: str, base: float | None = None
) -> Figure:
    """Draw one bar per layer; dropped layers are hatched.

    base: the value with all layers; bars start there.
    """
    text = f"{label} of {len(values)} layers. "
    text += f"Dropped: {', '.join(map(str, dropped))}." if len(dropped) else "No layer is dropped."
    kept = [layer for layer in values if layer not in dropped]
    pruned = [layer for layer in values if layer in dropped]
    bottom = base or 0
    with drawing(title, text) as figure:
        ax = figure.axes
        for name, layers, style in (("kept", kept, {"color": KEPT}), ("dropped", pruned, HATCHED)):
            if layers:
                heights = [values[layer] - bottom for layer in layers]
                ax.bar(layers, heights, bottom=bottom, width=0.75, label=name, **style)
        if base is not None:
            ax.axhline(base, color=INK, lw=1, ls="--", label=f"all layers {base:.3f}")
        if len(dropped) or base is not None:
            ax.legend(loc="best")
        ax.set(xlabel="layer", title=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    return figure.finish()


def rank_heat_map(title: str, rows: Sequence[np.ndarray], keep: Sequence[int], units: str) -> Figure:
    """Draw layers x ranks: scores sorted, averaged over bins, relative to the layer's mean.

    rows: scores of each layer. keep: number of kept units in each kept layer.
    """
    sizes = [row.size for row in rows]
    num_bins = min(*sizes, HEAT_MAP_BINS)
    relative = np.array([_binned(row, num_bins) / row.mean() for row in rows])
    n = max(sizes)
    is_uniform = len(set(sizes)) == 1
    number = f"{n:,}" if is_uniform else f"{min(sizes):,} to {n:,}"
    text = f"One row per layer: its {number} {units} sorted by score. {_range_text(relative)}"
    with drawing(title, text, HEAT_MAP) as figure:
        ax = figure.axes
        _draw_heat_map(ax, relative, (0.5, n + 0.5) if is_uniform else (0.0, 1.0))
        if is_uniform and len(set(keep)) == 1 and keep[0] < n:
            ax.axvline(keep[0] + 0.5, color="#fff", lw=3)
            ax.axvline(keep[0] + 0.5, color=PRUNED, lw=1.4)
            note_above(ax, f"cut after {keep[0]:,}", keep[0] + 0.5)
        ranks = "rank in the layer" if is_uniform else "rank / number in the layer"
        ax.set(xlabel=f"{units}, by {ranks}", title="layer")
    return figure.finish()


def _binned(row: np.ndarray, num_bins: int) -> list[float]:
    """Return the means of equal parts of the scores, largest first."""
    return [part.mean() for part in np.array_split(-np.sort(-row), num_bins)]


def unit_heat_map(
    title: str, rows: Sequence[np.ndarray], kept: Mapping[int, Sequence[int]], unit: str
) -> Figure:
    """Draw layers x units by number, relative to the layer's mean; pruned units are crossed.

    rows: scores of each layer. kept: layer -> kept units. unit: singular.
    """
    n = max(row.size for row in rows)
    relative = np.full((len(rows), n), np.nan)
    for layer, row in enumerate(rows):
        relative[layer, : row.size] = row / row.mean()
    pruned = [
        (number, layer)
        for layer, row in enumerate(rows)
        for number in range(row.size)
        if number not in kept.get(layer, ())
    ]
    text = (
        f"One row per layer, one column for each of {n} {unit}s. {_range_text(relative)} "
        f"{len(pruned)} of {sum(row.size for row in rows)} are pruned."
    )
    with drawing(title, text, HEAT_MAP) as figure:
        ax = figure.axes
        _draw_heat_map(ax, relative, (-0.5, n - 0.5))
        if pruned:
            ax.plot(*zip(*pruned), "x", color=PRUNED, ms=4, mew=1.2, clip_on=False)
            ax.annotate(
                "x pruned", (1, 1.01), xycoords="axes fraction", ha="right", va="bottom", color=PRUNED
            )
        ax.set(xlabel=unit, title="layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    return figure.finish()


def _range_text(relative: np.ndarray) -> str:
    low, high = np.nanmin(relative), np.nanmax(relative)
    return f"Scores range from {low:.2g} to {high:.2g} times the mean of their layer."


def _draw_heat_map(ax: Axes, values: np.ndarray, span: tuple[float, float]) -> None:
    ax.grid(False)
    image = ax.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap="YlGnBu",
        norm=BoundaryNorm(LEVELS, 256, extend="max"),
        extent=(*span, len(values) - 0.5, -0.5),
    )
    figure = ax.get_figure()
    assert figure is not None
    bar = figure.colorbar(image, ax=ax, fraction=0.12, pad=0.04, aspect=18, spacing="uniform", format="%g")
    bar.ax.set_title("x mean", fontsize=8, color=INK)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
