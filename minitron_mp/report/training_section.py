"""Sections of the report on training runs, and on the cost of all stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron_mp.artifacts.curves import Curve
from minitron_mp.artifacts.run_log import RunRecord
from minitron_mp.config.recipe import Recipe
from minitron_mp.report.document import Part, Section, Table
from minitron_mp.report.figures.training import training_figures
from minitron_mp.report.search_section import Candidate, last_distillation

Metrics = Mapping[str, Any]
"""Metrics of one logged step."""


TABLE_STEPS = 11
"""Number of rows in the table of steps, evenly spaced over the run."""

COST_HEADER = ("stage", "steps", "tokens", "tokens/s", "training hours", "total hours", "rank-hours")

COST_NOTE = (
    "Training hours: wall-clock time of the optimizer steps in all commands, without loading and "
    "saving. The hours of a search include its pruning, checkpoints and evaluation. Total hours: wall-clock "
    "time of the command that finished the stage, without the time before an interruption. "
    "Rank-hours: total hours times the ranks of the job. A stage without an entry in the run log has no "
    "total hours, and is not in the sums."
)


@dataclass(frozen=True)
class TrainingCost:
    """Steps, tokens and seconds of the training of one stage."""

    steps: int
    tokens: int
    seconds: float


def training_section(
    curve: Curve, metrics: Sequence[Metrics], before: Sequence[Part], divergence: str
) -> Section:
    """Build the section with summary, curves and a table of steps.

    before: parts that come first. divergence: name of the trained divergence, which is its key in
    the metrics. A run without a teacher has no such key, and other rows without it have an empty
    cell.
    """
    title = curve.title
    if not metrics:
        return Section(title, [*before, "No steps were logged."])
    cost = _training_cost(metrics)
    logged = divergence if any(divergence in row for row in metrics) else None
    columns = _columns(logged)
    numbers = sorted({round(x) for x in np.linspace(0, len(metrics) - 1, TABLE_STEPS)})
    rows = [[_cell(metrics[i].get(key), form) for key, form in columns.values()] for i in numbers]
    summary = (
        f"{cost.steps} steps, {cost.tokens:,} tokens, {cost.seconds / 60:.1f} minutes, "
        f"{cost.tokens / cost.seconds:,.0f} tokens/s over all ranks. "
        f"All steps: `{curve.file}`, `tensorboard/{curve.name}`.{_events(metrics)}"
    )
    figures = training_figures(title, metrics, logged)
    return Section(title, [*before, summary, *figures, Table(list(columns), rows)])


def _events(metrics: Sequence[Metrics]) -> str:
    """Return sentences about steps without an update, loss spikes and the best validation."""
    text = ""
    num_skipped = metrics[-1].get("num_skipped", 0)
    if num_skipped:
        text += f" Steps without an update, because gradient or loss was not finite: {num_skipped}."
    num_spikes = sum("spike_over" in row for row in metrics)
    if num_spikes:
        text += f" Loss spikes: {num_spikes}."
    validated = [row for row in metrics if "valid_loss" in row]
    if validated:
        best = min(validated, key=lambda row: row["valid_loss"])
        text += f" Lowest held-out loss: {best['valid_loss']:.4f} at step {best['step']}."
    return text


def _columns(divergence: str | None) -> dict[str, tuple[str, str]]:
    """Return column of the table of steps -> (key of the metrics, format)."""
    columns = {"step": ("step", "d"), "loss": ("loss", ".4f")}
    if divergence is not None:
        columns[divergence] = (divergence, ".4f")
    return {**columns, "learning rate": ("lr", ".2e"), "gradient norm": ("grad_norm", ".2f")}


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _training_cost(metrics: Sequence[Metrics]) -> TrainingCost:
    tokens = round(sum(row["num_tokens"] for row in metrics))
    return TrainingCost(len(metrics), tokens, sum(row["step_time_s"] for row in metrics))


def cost_section(
    metrics: Mapping[str, Sequence[Metrics]],
    candidates: Sequence[Candidate],
    recipe: Recipe,
    run_log: Mapping[str, RunRecord],
) -> Section:
    """Build the section with steps, tokens and hours of each stage. candidates: of a search."""
    costs = {stage: _training_cost(rows) for stage, rows in metrics.items() if rows}
    search = _search_cost(candidates, recipe)
    if search:
        costs["search"] = search
    rows = []
    hours = 0.0
    rank_hours = 0.0
    for stage in dict.fromkeys([*run_log, *costs]):
        training_cells = ["", "", "", ""]
        if stage in costs:
            cost = costs[stage]
            training_cells = [
                f"{cost.steps:,}",
                f"{cost.tokens:,}",
                f"{cost.tokens / cost.seconds:,.0f}",
                f"{cost.seconds / 3600:.3f}",
            ]
        total_cells = ["", ""]
        if stage in run_log:
            stage_hours = run_log[stage].seconds / 3600
            stage_rank_hours = stage_hours * run_log[stage].ranks
            hours += stage_hours
            rank_hours += stage_rank_hours
            total_cells = [f"{stage_hours:.3f}", f"{stage_rank_hours:.3f}"]
        rows.append((stage, *training_cells, *total_cells))
    if run_log:
        rows.append(("total", "", "", "", "", f"{hours:.3f}", f"{rank_hours:.3f}"))
    return Section("Cost", [COST_NOTE, Table(COST_HEADER, rows)])


def _search_cost(candidates: Sequence[Candidate], recipe: Recipe) -> TrainingCost | None:
    """Return the cost of distilling the candidates of a search; None if none was distilled."""
    rounds = [measurement for candidate in candidates for measurement in candidate["distilled"]]
    if not rounds:
        return None
    steps = 0
    for candidate in candidates:
        last = last_distillation(candidate)
        steps += last["steps"] if last else 0
    tokens = steps * recipe.distill.global_batch_size * recipe.data.sequence_length
    return TrainingCost(steps, tokens, sum(measurement["seconds"] for measurement in rounds))
