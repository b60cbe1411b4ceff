"""Figure of the stage `depth`: loss or accuracy without some layers."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from minitron_mp.report.document import Figure
from minitron_mp.report.figures.drawing import INK, KEPT, PRUNED, SOFT, drawing
from minitron_mp.report.figures.importance import layer_bars

Trial = tuple[Sequence[int], float]
"""(dropped layers, loss or accuracy)."""


def trials_figure(
    method: str,
    base: float,
    trials: Sequence[Trial],
    kept: Sequence[int],
    unit: str = "loss (nats per token)",
    *,
    higher_is_better: bool = False,
) -> Figure:
    """Draw the loss, or the accuracy, of every trial, and mark the chosen one.

    method: drop (without one layer), block (without a block of layers) or greedy (after each
    round). base: the value with all layers. kept: layers of the plan.
    """
    quantity = unit.split(" ")[0].capitalize()
    num_layers = max([*kept, *(max(layers) for layers, _ in trials)]) + 1
    dropped = sorted(set(range(num_layers)) - set(kept))
    if method == "drop":
        values = {layers[0]: value for layers, value in trials}
        return layer_bars(f"{quantity} without one layer", values, dropped, unit, base)
    is_greedy = method == "greedy"
    if is_greedy:
        title = f"{quantity} after each dropped layer"
    else:
        block_size = len(trials[0][0])
        title = (
            f"{quantity} without a layer"
            if block_size == 1
            else f"{quantity} without {block_size} layers in a row"
        )
    # The plan of a search candidate may keep all layers. Then no trial is the chosen one.
    chosen = next((i for i, (layers, _) in enumerate(trials) if sorted(layers) == dropped), None)
    x = [len(layers) if is_greedy else layers[0] for layers, _ in trials]
    values_by_trial = [value for _, value in trials]
    text = f"{len(trials)} trials; "
    if chosen is not None:
        text += f"chosen: without layers {', '.join(map(str, dropped))}, {values_by_trial[chosen]:.4f}; "
    text += f"all layers {base:.4f}; {'higher' if higher_is_better else 'lower'} is better."
    with drawing(title, text) as figure:
        ax = figure.axes
        ax.plot(x, values_by_trial, "o-", color=KEPT, ms=3.5, lw=1.2)
        if chosen is not None:
            ax.plot(x[chosen], values_by_trial[chosen], "D", color=PRUNED, ms=7, label="chosen")
        ax.axhline(base, color=INK, lw=1, ls="--", label=f"all layers {base:.3f}")
        if is_greedy:
            _label_rounds(ax, trials)
        xlabel = "layers dropped (labels: dropped layer)" if is_greedy else "first layer of the block"
        ax.set(xlabel=xlabel, title=unit)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
        ax.legend(loc="best")
    return figure.finish()


def _label_rounds(ax: Axes, trials: Sequence[Trial]) -> None:
    """Label each round of a greedy search with the layer that it drops."""
    before: set[int] = set()
    for layers, value in trials:
        (layer,) = set(layers) - before
        ax.annotate(
            str(layer),
            (len(layers), value),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=SOFT,
        )
        before = set(layers)
