"""Figures of the report, as SVG elements to stand inside a page. Plain numbers in, page.Figure out; the only user of matplotlib.

Nothing is told by colour alone: what is cut is hatched or marked, lines have labels, and every figure has a sentence that says the same.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, PercentFormatter

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

POINTS, BINS = 128, 64
"""Of a curve, and along the ranks of a heat map: what a screen can show."""

LEVELS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 4)
"""Of a score, in means of its layer."""


def kept_layers(num_layers: int, shares: Mapping[str, Mapping[int, float]]) -> Figure:
    """Which layers stay, and what share of each one's importance. shares: axis -> kept layer -> share."""
    kept = sorted(next(iter(shares.values())))
    dropped = sorted(set(range(num_layers)) - set(kept))
    names = ", ".join(map(str, dropped)) or "none"
    with _drawing(
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
        for (axis, values), colour, marker in zip(shares.items(), (KEPT, "#3f8f5f"), ("o", "s")):
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


def curve_figure(title: str, scores: np.ndarray, keep: int, unit: str) -> Figure:
    """Scores sorted from the largest, one line a row of [rows, n], with the cut after the first `keep`."""
    ordered, n = -np.sort(-scores, axis=1), scores.shape[1]
    picked = np.unique(np.linspace(0, n - 1, min(n, POINTS)).round().astype(int))
    cut = f"The first {keep:,} of {n:,} stay." if keep < n else f"All {n:,} stay."
    several = " A line is darker the earlier its layer." * (len(ordered) > 1)
    with _drawing(title, f"Importance scores, largest first. {cut}{several}") as (ax, done):
        colours = (
            matplotlib.colormaps["viridis"](np.linspace(0, 0.78, len(ordered)))
            if len(ordered) > 1
            else [KEPT]
        )
        for row, colour in zip(ordered, colours):
            ax.plot(
                picked + 1,
                row[picked],
                color=colour,
                lw=0.8 if len(ordered) > 1 else 1.6,
                marker="o" if n < 24 else None,
                ms=2.5,
            )
        _mark_cut(ax, keep, n)
        if ordered.min() > 0 and ordered.max() > 8 * ordered.min():
            ax.set_yscale("log")
        ax.set(xlabel=f"{unit}, by rank", title="score")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    return done()


def _mark_cut(ax: Any, keep: int, n: int) -> None:
    if keep < n:
        ax.axvspan(keep + 0.5, n + 0.5, **HATCHED, alpha=0.6, linewidth=0)
        ax.axvline(keep + 0.5, color=CUT, lw=1.2)
        _note(ax, f"cut after {keep:,}", keep + 0.5)


def _note(ax: Any, text: str, x: float) -> None:
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


def layer_bars(
    title: str, values: Mapping[int, float], dropped: Sequence[int], label: str, base: float | None = None
) -> Figure:
    """A bar a layer; those that go are hatched. base: a line for the whole model, which bars start from."""
    gone = f"Dropped: {', '.join(map(str, dropped))}." if len(dropped) else "No layer is dropped."
    with _drawing(title, f"{label} of {len(values)} layers. {gone}") as (ax, done):
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
    with _drawing(title, text) as (ax, done):
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


def heat_by_rank(title: str, scores: np.ndarray, keep: int, unit: str) -> Figure:
    """Layers x neurons, each layer's sorted from the largest and averaged over bins, in means of the layer. scores [L, n]."""
    ordered, n = -np.sort(-scores, axis=1), scores.shape[1]
    parts = np.array_split(np.arange(n), min(n, BINS))
    binned = np.stack([ordered[:, part].mean(1) for part in parts], 1) / scores.mean(1, keepdims=True)
    with _drawing(
        title, f"Each row is a layer, its {n:,} {unit} sorted by score; {_extent(binned)}", HEAT
    ) as (ax, done):
        _heat(ax, binned, (0.5, n + 0.5))
        if keep < n:
            ax.axvline(keep + 0.5, color="#fff", lw=3)
            ax.axvline(keep + 0.5, color=CUT, lw=1.4)
            _note(ax, f"cut after {keep:,}", keep + 0.5)
        ax.set(xlabel=f"{unit}, by rank in the layer", title="layer")
    return done()


def heat_heads(title: str, scores: np.ndarray, kept: Mapping[int, Sequence[int]]) -> Figure:
    """Layers x heads by number, in means of the layer; a cross on what is cut. scores [L, np], kept: layer -> heads."""
    relative = scores / scores.mean(1, keepdims=True)
    cut = [
        (head, layer)
        for layer in range(len(scores))
        for head in range(scores.shape[1])
        if head not in kept.get(layer, ())
    ]
    text = f"Each row is a layer, each column one of {scores.shape[1]} heads; {_extent(relative)} {len(cut)} of {scores.size} are cut."
    with _drawing(title, text, HEAT) as (ax, done):
        _heat(ax, relative, (-0.5, scores.shape[1] - 0.5))
        if cut:
            ax.plot(*zip(*cut), "x", color=CUT, ms=4, mew=1.2, clip_on=False)
            ax.annotate("x cut", (1, 1.01), xycoords="axes fraction", ha="right", va="bottom", color=CUT)
        ax.set(xlabel="head", title="layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    return done()


def _extent(relative: np.ndarray) -> str:
    return f"scores run from {relative.min():.2g} to {relative.max():.2g} means of their layer."


def _heat(ax: Any, values: np.ndarray, span: tuple[float, float]) -> None:
    ax.grid(False)
    norm = BoundaryNorm(LEVELS, 256, extend="max")
    extent = (*span, len(values) - 0.5, -0.5)
    image = ax.imshow(values, aspect="auto", interpolation="nearest", cmap="YlGnBu", norm=norm, extent=extent)
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.12, pad=0.04, aspect=18, spacing="uniform", format="%g")
    bar.ax.set_title("x mean", fontsize=8, color=INK)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def training_figure(name: str, metrics: Sequence[Mapping[str, float]]) -> list[Figure]:
    """Loss and KL, learning rate and gradient norm over the steps of a run."""
    steps = [m["step"] for m in metrics]
    same = all(m["loss"] == m["kl"] for m in metrics)
    losses = (
        {"loss = KL to the teacher": "loss"}
        if same
        else {"loss": "loss"} | ({"KL to the teacher": "kl"} if any(m["kl"] for m in metrics) else {})
    )
    panels: list[tuple[str, dict[str, str], str]] = [
        (f"{name}: loss", losses, "nats a token"),
        (f"{name}: learning rate", {"learning rate": "lr"}, "learning rate"),
        (f"{name}: gradient norm", {"gradient norm": "grad_norm"}, "global norm before clipping"),
    ]
    return [
        _lines(title, steps, {label: [m[key] for m in metrics] for label, key in series.items()}, unit)
        for title, series, unit in panels
    ]


def _lines(title: str, steps: Sequence[float], series: Mapping[str, Sequence[float]], unit: str) -> Figure:
    ends = "; ".join(f"{label} from {values[0]:.4g} to {values[-1]:.4g}" for label, values in series.items())
    top = max(map(max, series.values()))
    power = int(np.floor(np.log10(top))) if 0 < top < 0.01 else 0  # ticks of few digits
    with _drawing(title, f"Over {len(steps)} steps: {ends}.") as (ax, done):
        for (label, values), colour, style in zip(series.items(), (KEPT, CUT), ("-", "--")):
            ax.plot(
                steps,
                np.array(values) / 10.0**power,
                style,
                color=colour,
                lw=1.3,
                label=label,
                marker="o" if len(steps) < 4 else None,
            )
        ax.set(xlabel="step", title=unit + f" / 1e{power}" * bool(power))
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        if len(series) > 1 or label != title.rpartition(": ")[2]:
            ax.legend(loc="best")
    return done()


def pareto(
    title: str,
    points: Sequence[tuple[str, float, float, bool]],
    x_label: str,
    y_label: str,
    front: Sequence[str],
) -> Figure:
    """Candidates as points (name, x, y, chosen), less is better on both axes; a line joins those of the front."""
    ends = {name: (x, y) for name, x, y, _ in points}
    text = f"{len(points)} candidates. On the front: {', '.join(front)}."
    with _drawing(title, text) as (ax, done):
        ax.step(
            *zip(*sorted(ends[name] for name in front)),
            where="post",
            color=SOFT,
            lw=1,
            ls="--",
            label="front",
        )
        for chosen, style in (
            (False, {"marker": "o", "color": KEPT, "ms": 5}),
            (True, {"marker": "D", "color": CUT, "ms": 7, "label": "chosen"}),
        ):
            if rows := [(x, y) for _, x, y, mine in points if mine is chosen]:
                ax.plot(*zip(*rows), ls="none", **style)
        for name, x, y, chosen in points:
            if len(points) > 12 and name not in front and not chosen:
                continue  # too many words to read
            ax.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7.5, color=SOFT)
        ax.margins(x=0.3, y=0.12)  # names stand to the right of their points
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
        ax.set(xlabel=x_label, title=y_label)
        ax.legend(loc="best")
    return done()


def write_scaling(
    path: Path, points: Sequence[tuple[int, float, Mapping[str, float]]], work: Sequence[str], title: str
) -> None:
    """An image file: speed of a GPU against the number of GPUs, and where the time of a step goes. points: (GPUs, tokens/s/GPU, seconds by part).

    Parts that are computation (work) are one band; of the others those that reach 2 % somewhere have a band each.
    """
    worlds = [str(n) for n, _, _ in points]
    shares = [
        {name: value / sum(seconds.values()) for name, value in seconds.items()} for _, _, seconds in points
    ]
    names = dict.fromkeys(
        name for share in shares for name, value in share.items() if name not in work and value >= 0.02
    )
    bands = {"computation": [sum(share.get(name, 0.0) for name in work) for share in shares]} | {
        n: [share.get(n, 0.0) for share in shares] for n in names
    }
    canvas = Canvas(figsize=(9.4, 3.6), layout="constrained")
    with matplotlib.rc_context(STYLE):
        speed, parts = canvas.subplots(1, 2)
        speed.plot(worlds, [value for _, value, _ in points], "-o", color=KEPT, ms=4, lw=1.3)
        speed.set(xlabel="GPUs", title=f"tokens/s/GPU (estimate), {title}")
        speed.set_ylim(bottom=0)
        bottom = np.zeros(len(points))
        for (name, values), hatch in zip(
            bands.items(), itertools.cycle(("", "///", "...", "xx", "--", "ooo", "++"))
        ):
            colour = KEPT if name == "computation" else None
            parts.bar(
                worlds,
                values,
                bottom=bottom,
                label=name,
                hatch=hatch,
                color=colour,
                edgecolor="white",
                linewidth=0.4,
            )
            bottom += values
        parts.set(xlabel="GPUs", title="share of a step, fastest layout each", ylim=(0, 1))
        parts.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        parts.legend(loc="lower right", fontsize=7, framealpha=0.9, frameon=True)
        canvas.savefig(path, dpi=144)


@contextmanager
def _drawing(
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
