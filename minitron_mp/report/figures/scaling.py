"""Figure of the command `estimate`: throughput and parts of a step against the number of GPUs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import PercentFormatter

from minitron_mp.report.figures.drawing import KEPT, STYLE

MIN_SHARE = 0.02
"""Smallest share of a step that has a separate band."""

HATCHES = ("", "///", "...", "xx", "--", "ooo", "++")


def write_scaling_figure(
    path: Path,
    points: Sequence[tuple[int, float, Mapping[str, float]]],
    computation: Sequence[str],
    title: str,
) -> None:
    """Write an image file: throughput per GPU, and the shares of a step, against the number of
    GPUs.

    points: (GPUs, tokens/s/GPU, seconds of a step by part). computation: parts that share one band;
    each other part has a band if it reaches MIN_SHARE somewhere.
    """
    worlds = [str(world) for world, _, _ in points]
    bands = _bands([seconds for _, _, seconds in points], computation)
    canvas = Canvas(figsize=(9.4, 3.6), layout="constrained")
    with matplotlib.rc_context(STYLE):
        speed, parts = canvas.subplots(1, 2)
        speed.plot(worlds, [throughput for _, throughput, _ in points], "-o", color=KEPT, ms=4, lw=1.3)
        speed.set(xlabel="GPUs", title=f"tokens/s/GPU (estimate), {title}")
        speed.set_ylim(bottom=0)
        bottom = np.zeros(len(points))
        for (name, values), hatch in zip(bands.items(), itertools.cycle(HATCHES)):
            parts.bar(
                worlds,
                values,
                bottom=bottom,
                label=name,
                hatch=hatch,
                color=KEPT if name == "computation" else None,
                edgecolor="white",
                linewidth=0.4,
            )
            bottom += values
        parts.set(xlabel="GPUs", title="share of a step, fastest layout for each", ylim=(0, 1))
        parts.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        parts.legend(loc="lower right", fontsize=7, framealpha=0.9, frameon=True)
        canvas.savefig(path, dpi=144)


def _bands(steps: Sequence[Mapping[str, float]], computation: Sequence[str]) -> dict[str, list[float]]:
    """Return the share of each band in each step: computation, then the parts above MIN_SHARE."""
    shares = []
    for seconds in steps:
        step_s = sum(seconds.values())
        shares.append({name: value / step_s for name, value in seconds.items()})
    bands = {"computation": [sum(share.get(name, 0.0) for name in computation) for share in shares]}
    for name in dict.fromkeys(name for share in shares for name in share):
        values = [share.get(name, 0.0) for share in shares]
        if name not in computation and max(values) >= MIN_SHARE:
            bands[name] = values
    return bands
