"""Figures of importance scores: curves by rank, heat maps by layer, and kept layers."""

from __future__ import annotations

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
    WIDE,
    drawing,
    note_above,
)

CURVE_POINTS = 128
"""Points of a curve: more cannot be seen."""

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
        for (axis, values), colour, marker in zip(shares.items(), (KEPT, "#3f8f5f"), ("o", "s")):
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


def score_curves(title: str, scores: np.ndarray, keep: int, unit: str) -> Figure:
    """Draw the scores of each row of [rows, n], largest first, and the cut after `keep`."""
    ordered = -np.sort(-scores, axis=1)
    num_rows, n = scores.shape
    points = np.unique(np.linspace(0, n - 1, min(n, CURVE_POINTS)).round().astype(int))
    text = "Importance scores, largest first. "
    text += f"The top {keep:,} of {n:,} are kept." if keep < n else f"All {n:,} are kept."
    colours: Any = [KEPT]
    if num_rows > 1:
        text += " Earlier layers are darker."
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.78, num_rows))
    with drawing(title, text) as figure:
        ax = figure.axes
        width = 0.8 if num_rows > 1 else 1.6
        marker = "o" if n < 24 else None
        for row, colour in zip(ordered, colours):
            ax.plot(points + 1, row[points], color=colour, lw=width, marker=marker, ms=2.5)
        if keep < n:
            ax.axvspan(keep + 0.5, n + 0.5, **HATCHED, alpha=0.6, linewidth=0)
            ax.axvline(keep + 0.5, color=PRUNED, lw=1.2)
            note_above(ax, f"cut after {keep:,}", keep + 0.5)
        if ordered.min() > 0 and ordered.max() > 8 * ordered.min():
            ax.set_yscale("log")
        ax.set(xlabel=f"{unit}, by rank", title="score")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    return figure.finish()


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


def rank_heat_map(title: str, scores: np.ndarray, keep: int, unit: str) -> Figure:
    """Draw layers x ranks: each layer's scores sorted, averaged over bins, relative to the layer's
    mean.

    scores: [L, n].
    """
    ordered = -np.sort(-scores, axis=1)
    n = scores.shape[1]
    bins = np.array_split(np.arange(n), min(n, HEAT_MAP_BINS))
    binned = np.stack([ordered[:, columns].mean(1) for columns in bins], 1)
    relative = binned / scores.mean(1, keepdims=True)
    text = f"One row per layer: its {n:,} {unit} sorted by score. {_range_text(relative)}"
    with drawing(title, text, HEAT_MAP) as figure:
        ax = figure.axes
        _draw_heat_map(ax, relative, (0.5, n + 0.5))
        if keep < n:
            ax.axvline(keep + 0.5, color="#fff", lw=3)
            ax.axvline(keep + 0.5, color=PRUNED, lw=1.4)
            note_above(ax, f"cut after {keep:,}", keep + 0.5)
        ax.set(xlabel=f"{unit}, by rank in the layer", title="layer")
    return figure.finish()


def unit_heat_map(title: str, scores: np.ndarray, kept: Mapping[int, Sequence[int]], unit: str) -> Figure:
    """Draw layers x units by number, relative to the layer's mean; pruned units are crossed.

    scores: [L, n]. kept: layer -> kept units. unit: singular.
    """
    num_layers, n = scores.shape
    relative = scores / scores.mean(1, keepdims=True)
    pruned = [
        (number, layer)
        for layer in range(num_layers)
        for number in range(n)
        if number not in kept.get(layer, ())
    ]
    text = (
        f"One row per layer, one column for each of {n} {unit}s. {_range_text(relative)} "
        f"{len(pruned)} of {scores.size} are pruned."
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
    return f"Scores range from {relative.min():.2g} to {relative.max():.2g} times the mean of their layer."


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
