"""Figures of the report on importance and on what was cut.

Those of units are loops over the table of axes. Layers may differ in their number of units.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import BoundaryNorm
from matplotlib.ticker import MaxNLocator, PercentFormatter

from minitron_mp.models.axes import AXES, Axis
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.pruning.scores import Scores
from minitron_mp.report.document import Figure
from minitron_mp.report.drawing import CUT, HATCHED, HEAT, INK, KEPT, SOFT, WIDE, drawing, note_above

POINTS, BINS = 128, 64
"""Of a curve, and along the ranks of a heat map: what a screen can show."""

LEVELS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 4)
"""Of a score, in means of its layer."""

LINES = ((KEPT, "o"), ("#3f8f5f", "s"), (SOFT, "^"), (INK, "v"))
"""(colour, marker) of one axis after the other."""


def kept_layers(num_layers: int, shares: Mapping[str, Mapping[int, float]]) -> Figure:
    """Which layers stay, and what share of each one's importance. shares: axis -> kept layer -> share."""
    kept = sorted(next(iter(shares.values())))
    dropped = sorted(set(range(num_layers)) - set(kept))
    names = ", ".join(map(str, dropped)) or "none"
    with drawing(
        "What stays of each layer",
        f"Of {num_layers} layers {len(kept)} stay; dropped: {names}.",
        WIDE,
        wide=True,
    ) as (ax, done):
        for layer in dropped:
            ax.axvspan(
                layer - 0.5,
                layer + 0.5,
                **HATCHED,
                linewidth=0,
                label="layer dropped" if layer == dropped[0] else None,
            )
        for (axis, values), (colour, marker) in zip(shares.items(), itertools.cycle(LINES)):
            # A gap where layers are dropped.
            ax.plot(
                range(num_layers),
                [values.get(layer, np.nan) for layer in range(num_layers)],
                marker,
                color=colour,
                ls="-",
                ms=4,
                lw=1.2,
                label=axis,
            )
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
    return done()


def unit_figures(plan: PrunePlan, scores: Scores) -> list[Figure]:
    """Scores of every axis by rank, with the cut; then heat maps of the layers."""
    curves = [figure for axis in AXES.values() for figure in _curves(axis, plan, scores)]
    return curves + [_heat_map(axis, plan, scores) for axis in AXES.values() if axis.per_layer]


def _curves(axis: Axis, plan: PrunePlan, scores: Scores) -> list[Figure]:
    """The units by rank, inside their groups; the groups themselves before them."""
    layers = axis.layers(plan.teacher)
    students = list(enumerate(plan.layers)) if axis.per_layer else [(0, layers[0])]
    title = axis.size.units.capitalize()
    groups = [scores[axis.name][layer].reshape(axis.num_groups(plan.teacher, layer), -1) for layer in layers]
    keep = [axis.num_units(plan.student, i) // axis.num_groups(plan.student, i) for i, _ in students]
    rows = [row for members in groups for row in members]
    if axis.group is None:
        lines = ", a line a layer" if axis.per_layer else ""
        return [curve_figure(title + lines, rows, keep, axis.size.unit)]
    group_title = f"{axis.group.units.capitalize()}, a line a layer"
    group_scores = [np.linalg.norm(members, axis=1) for members in groups]
    keep_groups = [axis.num_groups(plan.student, i) for i, _ in students]
    figures = [curve_figure(group_title, group_scores, keep_groups, axis.group.unit)]
    if max(map(len, rows)) > 1:
        figures.append(curve_figure(f"{title}, a line a {axis.group.unit}", rows, keep, axis.size.unit))
    return figures


def _heat_map(axis: Axis, plan: PrunePlan, scores: Scores) -> Figure:
    """By number where units are few enough to have groups, by rank otherwise."""
    rows = [scores[axis.name][layer] for layer in axis.layers(plan.teacher)]
    title = f"{axis.size.units.capitalize()} of each layer"
    if axis.group is not None:
        return heat_by_number(title, rows, plan.keep[axis.name], axis.size.unit)
    keep = [axis.num_units(plan.student, i) for i in range(plan.student.num_layers)]
    return heat_by_rank(title, rows, keep, axis.size.units)


def curve_figure(title: str, rows: Sequence[np.ndarray], keep: Sequence[int], unit: str) -> Figure:
    """Scores sorted from the largest, one line a row, with the cut where all rows have the same.

    keep: how many stay in each row that is not dropped.
    """
    ordered = [-np.sort(-row) for row in rows]
    longest = max(map(len, ordered))
    text = f"Importance scores, largest first. {_what_stays(rows, keep)}"
    if len(ordered) > 1:
        text += " A line is darker the earlier its layer."
    with drawing(title, text) as (ax, done):
        colours: Any = [KEPT]
        if len(ordered) > 1:
            colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.78, len(ordered)))
        for row, colour in zip(ordered, colours):
            picked = np.unique(np.linspace(0, len(row) - 1, min(len(row), POINTS)).round().astype(int))
            ax.plot(
                picked + 1,
                row[picked],
                color=colour,
                lw=0.8 if len(ordered) > 1 else 1.6,
                marker="o" if longest < 24 else None,
                ms=2.5,
            )
        if len(set(keep)) == 1:
            _mark_cut(ax, keep[0], longest)
        least, most = min(row.min() for row in ordered), max(row.max() for row in ordered)
        if least > 0 and most > 8 * least:
            ax.set_yscale("log")
        ax.set(xlabel=f"{unit}, by rank", title="score")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    return done()


def _what_stays(rows: Sequence[np.ndarray], keep: Sequence[int]) -> str:
    sizes = {len(row) for row in rows}
    if len(sizes) > 1 or len(set(keep)) > 1:
        return f"The first {min(keep):,} to {max(keep):,} of {min(sizes):,} to {max(sizes):,} stay."
    (size,), first = sizes, keep[0]
    return f"The first {first:,} of {size:,} stay." if first < size else f"All {size:,} stay."


def _mark_cut(ax: Any, keep: int, n: int) -> None:
    if keep < n:
        ax.axvspan(keep + 0.5, n + 0.5, **HATCHED, alpha=0.6, linewidth=0)
        ax.axvline(keep + 0.5, color=CUT, lw=1.2)
        note_above(ax, f"cut after {keep:,}", keep + 0.5)


def layer_bars(
    title: str, values: Mapping[int, float], dropped: Sequence[int], label: str, base: float | None = None
) -> Figure:
    """A bar a layer; those that go are hatched. base: a line for the whole model, which bars start from."""
    gone = f"Dropped: {', '.join(map(str, dropped))}." if len(dropped) else "No layer is dropped."
    with drawing(title, f"{label} of {len(values)} layers. {gone}") as (ax, done):
        for name, style in (("kept", {"color": KEPT}), ("dropped", HATCHED)):
            rows = [layer for layer in values if (layer in dropped) == (name == "dropped")]
            if rows:
                ax.bar(
                    rows,
                    [values[layer] - (base or 0) for layer in rows],
                    bottom=base or 0,
                    width=0.75,
                    label=name,
                    **style,
                )
        if base is not None:
            ax.axhline(base, color=INK, lw=1, ls="--", label=f"whole model {base:.3f}")
        if len(dropped) or base is not None:
            ax.legend(loc="best")
        ax.set(xlabel="layer", title=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    return done()


def trials_figure(
    method: str,
    base: float,
    found: Sequence[tuple[Sequence[int], float]],
    kept: Sequence[int],
    unit: str = "loss (nats a token)",
    better: int = -1,
) -> Figure:
    """What the stage `depth` measured: the loss (or accuracy: unit, better 1) without a layer (drop), a block (block), or after each round (greedy)."""
    what = unit.split(" ")[0].capitalize()
    layers = range(max([*kept, *(max(out) for out, _ in found)]) + 1)
    dropped = sorted(set(layers) - set(kept))
    if method == "drop":
        return layer_bars(
            f"{what} without one layer", {out[0]: loss for out, loss in found}, dropped, unit, base
        )
    greedy = method == "greedy"
    x = [len(out) for out, _ in found] if greedy else [out[0] for out, _ in found]
    losses = [loss for _, loss in found]
    best = next(
        (i for i, (out, _) in enumerate(found) if sorted(out) == dropped), None
    )  # a search may keep all layers
    in_a_row = len(found[0][0])
    title = (
        f"{what} after each layer that goes"
        if greedy
        else f"{what} without {in_a_row} layer{'s in a row' * (in_a_row > 1)}"
    )
    chosen = (
        f"chosen: without layers {', '.join(map(str, dropped))}, {losses[best]:.4f}; "
        if best is not None
        else ""
    )
    text = (
        f"{len(found)} trials; {chosen}whole model {base:.4f}; {'more' if better > 0 else 'less'} is better."
    )
    with drawing(title, text) as (ax, done):
        ax.plot(x, losses, "o-", color=KEPT, ms=3.5, lw=1.2)
        if best is not None:
            ax.plot(x[best], losses[best], "D", color=CUT, ms=7, label="chosen")
        ax.axhline(base, color=INK, lw=1, ls="--", label=f"whole model {base:.3f}")
        if greedy:
            for i, ((out, loss), before) in enumerate(zip(found, [(), *(out for out, _ in found)])):
                (layer,) = set(out) - set(before)
                ax.annotate(
                    str(layer),
                    (x[i], loss),
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=SOFT,
                )
        ax.set(
            xlabel="layers dropped (the figure: which one)" if greedy else "first layer of the block",
            title=unit,
        )
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
        ax.legend(loc="best")
    return done()


def heat_by_rank(title: str, rows: Sequence[np.ndarray], keep: Sequence[int], units: str) -> Figure:
    """Layers x units, each layer's sorted from the largest and averaged over bins, in means of the layer.

    rows: scores of each layer. keep: how many stay in each kept one.
    """
    sizes = [len(row) for row in rows]
    bins = min(*sizes, BINS)
    binned = np.stack(
        [[part.mean() for part in np.array_split(-np.sort(-row), bins)] / row.mean() for row in rows]
    )
    uniform = len({*sizes}) == 1 and len({*keep}) == 1
    number = f"{min(sizes):,}" if len({*sizes}) == 1 else f"{min(sizes):,} to {max(sizes):,}"
    text = f"Each row is a layer, its {number} {units} sorted by score; {_extent(binned)}"
    with drawing(title, text, HEAT) as (ax, done):
        _heat(ax, binned, (0.5, sizes[0] + 0.5) if uniform else (0.0, 1.0))
        if uniform and keep[0] < sizes[0]:
            ax.axvline(keep[0] + 0.5, color="#fff", lw=3)
            ax.axvline(keep[0] + 0.5, color=CUT, lw=1.4)
            note_above(ax, f"cut after {keep[0]:,}", keep[0] + 0.5)
        unit_of_x = "by rank in the layer" if uniform else "by share of the ranks of the layer"
        ax.set(xlabel=f"{units}, {unit_of_x}", title="layer")
    return done()


def heat_by_number(
    title: str, rows: Sequence[np.ndarray], kept: Mapping[int, Sequence[int]], unit: str
) -> Figure:
    """Layers x units by number, in means of the layer; a cross on what is cut.

    rows: scores of each layer. kept: layer -> kept units; none of a layer that is not in it.
    """
    most = max(map(len, rows))
    relative = np.full((len(rows), most), np.nan)
    for layer, row in enumerate(rows):
        relative[layer, : len(row)] = row / row.mean()
    cut = [
        (number, layer)
        for layer, row in enumerate(rows)
        for number in range(len(row))
        if number not in kept.get(layer, ())
    ]
    text = (
        f"Each row is a layer, each column one of {most} {unit}s; {_extent(relative)} "
        f"{len(cut)} of {sum(map(len, rows))} are cut."
    )
    with drawing(title, text, HEAT) as (ax, done):
        _heat(ax, relative, (-0.5, most - 0.5))
        if cut:
            ax.plot(*zip(*cut), "x", color=CUT, ms=4, mew=1.2, clip_on=False)
            ax.annotate("x cut", (1, 1.01), xycoords="axes fraction", ha="right", va="bottom", color=CUT)
        ax.set(xlabel=unit, title="layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    return done()


def _extent(relative: np.ndarray) -> str:
    low, high = np.nanmin(relative), np.nanmax(relative)
    return f"scores run from {low:.2g} to {high:.2g} means of their layer."


def _heat(ax: Any, values: np.ndarray, span: tuple[float, float]) -> None:
    ax.grid(False)
    norm = BoundaryNorm(LEVELS, 256, extend="max")
    extent = (*span, len(values) - 0.5, -0.5)
    image = ax.imshow(values, aspect="auto", interpolation="nearest", cmap="YlGnBu", norm=norm, extent=extent)
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.12, pad=0.04, aspect=18, spacing="uniform", format="%g")
    bar.ax.set_title("x mean", fontsize=8, color=INK)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
