"""Figure of an architecture search: the candidates and their Pareto front."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from minitron_mp.report.document import Figure
from minitron_mp.report.figures.drawing import KEPT, PRUNED, SOFT, drawing

Point = tuple[str, float, float, bool]
"""(name, x, y, whether it was chosen)."""

MAX_NAMES = 12
"""With more candidates only the chosen one and those on the front are labelled."""


def pareto_figure(
    title: str, points: Sequence[Point], x_label: str, y_label: str, front: Sequence[str]
) -> Figure:
    """Draw candidates as points, lower is better on both axes, with a line through the front."""
    positions = {name: (x, y) for name, x, y, _ in points}
    text = f"{len(points)} candidates. Pareto front: {', '.join(front)}."
    with drawing(title, text) as figure:
        ax = figure.axes
        front_x, front_y = zip(*sorted(positions[name] for name in front))
        ax.step(front_x, front_y, where="post", color=SOFT, lw=1, ls="--", label="front")
        candidates = [(x, y) for _, x, y, is_chosen in points if not is_chosen]
        chosen = [(x, y) for _, x, y, is_chosen in points if is_chosen]
        if candidates:
            ax.plot(*zip(*candidates), ls="none", marker="o", color=KEPT, ms=5)
        if chosen:
            ax.plot(*zip(*chosen), ls="none", marker="D", color=PRUNED, ms=7, label="chosen")
        for name, x, y, is_chosen in points:
            if len(points) <= MAX_NAMES or name in front or is_chosen:
                ax.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7.5, color=SOFT)
        ax.margins(x=0.3, y=0.12)  # names stand to the right of their points
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
        ax.set(xlabel=x_label, title=y_label)
        ax.legend(loc="best")
    return figure.finish()
