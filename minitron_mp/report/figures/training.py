"""Figures of a training run: loss, learning rate and gradient norm over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from minitron_mp.report.document import Figure
from minitron_mp.report.figures.drawing import KEPT, PRUNED, drawing


def training_figures(
    name: str, metrics: Sequence[Mapping[str, float]], divergence: str | None
) -> list[Figure]:
    """Draw loss and divergence, loss on held-out text, learning rate, and gradient norm.

    metrics: one entry per logged step. divergence: its key in the metrics; None if it is not
    logged. Its line has a gap at steps without it.
    """
    steps = [row["step"] for row in metrics]
    if divergence is None:
        losses = {"loss": "loss"}
    elif all(row.get("loss") == row.get(divergence) for row in metrics):
        losses = {f"loss = {divergence}": "loss"}
    else:
        losses = {"loss": "loss", divergence: divergence}

    def curves(keys: Mapping[str, str]) -> dict[str, list[float]]:
        return {label: [row.get(key, math.nan) for row in metrics] for label, key in keys.items()}

    return [
        _lines(f"{name}: loss", steps, curves(losses), "nats per token"),
        *_held_out_figures(name, metrics),
        _lines(f"{name}: learning rate", steps, curves({"learning rate": "lr"}), "learning rate"),
        _lines(
            f"{name}: gradient norm",
            steps,
            curves({"gradient norm": "grad_norm"}),
            "global norm before clipping",
        ),
    ]


def _held_out_figures(name: str, metrics: Sequence[Mapping[str, float]]) -> list[Figure]:
    """Draw the validations of a run; [] without validations."""
    rows = [row for row in metrics if "valid_loss" in row]
    if not rows:
        return []
    series = {"loss": [row["valid_loss"] for row in rows]}
    if all("valid_kl" in row for row in rows):
        series["KL to the teacher"] = [row["valid_kl"] for row in rows]
    return [_lines(f"{name}: held-out loss", [row["step"] for row in rows], series, "nats per token")]


def _lines(title: str, steps: Sequence[float], series: Mapping[str, Sequence[float]], unit: str) -> Figure:
    """Draw one line per series. series: label -> value of each step."""
    given = {label: [x for x in values if not math.isnan(x)] for label, values in series.items()}
    ends = "; ".join(f"{label} from {values[0]:.4g} to {values[-1]:.4g}" for label, values in given.items())
    top = max(max(values) for values in given.values())
    exponent = int(np.floor(np.log10(top))) if 0 < top < 0.01 else 0  # keeps tick labels short
    with drawing(title, f"Over {len(steps)} steps: {ends}.") as figure:
        ax = figure.axes
        marker = "o" if len(steps) < 4 else None
        for (label, values), colour, style in zip(series.items(), (KEPT, PRUNED), ("-", "--")):
            scaled = np.array(values) / 10.0**exponent
            ax.plot(steps, scaled, style, color=colour, lw=1.3, label=label, marker=marker)
        ax.set(xlabel="step", title=f"{unit} / 1e{exponent}" if exponent else unit)
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        if len(series) > 1 or next(iter(series)) != title.rpartition(": ")[2]:
            ax.legend(loc="best")
    return figure.finish()
