"""Figures of the report on training, search and planning. Plain numbers in, Figure out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, PercentFormatter

from minitron_mp.report.document import Figure
from minitron_mp.report.drawing import CUT, KEPT, SOFT, STYLE, drawing


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
    with drawing(title, f"Over {len(steps)} steps: {ends}.") as (ax, done):
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
    with drawing(title, text) as (ax, done):
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
