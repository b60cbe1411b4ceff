"""report.md and report.html: what was cut, what it cost, and how good the student is. One document, written in two ways."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minitron_mp.artifacts.files import read_json, write_text
from minitron_mp.artifacts.run_log import FILE, RunRecord, records_of, software
from minitron_mp.config.recipe import Recipe
from minitron_mp.console import say, table
from minitron_mp.models.axes import AXES, Axis
from minitron_mp.pruning.candidates import front
from minitron_mp.pruning.depth import DepthTrials
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.pruning.scores import Scores
from minitron_mp.report.correction_gain import correction_gain
from minitron_mp.report.document import Code, Document, Figure, Part, Section, Table, html, markdown
from minitron_mp.report.figures import pareto, training_figure
from minitron_mp.report.model_card import refresh_model_card
from minitron_mp.report.pruning_figures import kept_layers, layer_bars, trials_figure, unit_figures
from minitron_mp.report.tables import (
    evaluation,
    harness_table,
    headline,
    quality_table,
    speed_note,
    tasks_table,
    texts_table,
)

CURVES = {
    "correct": ("Teacher correction", "metrics_correct.jsonl"),
    "distill": ("Distillation", "metrics.jsonl"),
}
"""Stages that train: title of their section, file of their metrics."""


def write_report(project: Any) -> None:
    """Read a finished project's artefacts and write report.md and report.html beside them; one process."""
    document, root = collect(project), project.recipe.root
    result = next(part for part in document.sections[0].parts if isinstance(part, Table))
    table("result", result.header, result.rows)
    for name, write in (("report.md", markdown), ("report.html", html)):
        write_text(root / name, write(document))
    refresh_model_card(project)  # evaluate may have run again since the export
    say(f"report: {root / 'report.md'}, {root / 'report.html'}")


def collect(project: Any) -> Document:
    """All that the report says. project: pipeline.Project, finished."""
    recipe, paths = project.recipe, project.paths
    plan, importance, found = (
        PrunePlan.load(paths["plan"]),
        Scores.load(paths["score"]),
        evaluation(paths),
    )
    trials = DepthTrials.load(paths["depth"]) if "depth" in paths else None
    left_by = {"correct": "distill" if recipe.corrects_meanwhile else "correct", "distill": "distill"}
    metrics = {
        stage: _metrics(paths[folder], stage)
        for stage, folder in left_by.items()
        if stage == "distill" or recipe.correct
    }
    made = records_of(recipe.root, paths)
    found_by_search = read_json(paths["search"], "search --force")["candidates"] if "search" in paths else []
    quality, tasks, texts = quality_table(recipe, paths), tasks_table(found), texts_table(found)
    result: list[Part] = [
        f"On {found['pruned']['num_tokens']:,} held-out tokens. Losses and KL(teacher || model) are means in nats a token.",
        quality,
        *speed_note(found),
    ]
    if tasks is not None:
        result += ["Scores in tasks: shares of the items, zero-shot, with standard errors.", tasks]
    if texts is not None:
        result += ["Losses on further held-out texts, in nats a token.", texts]
    if (harness := harness_table(recipe.root, paths)) is not None:
        result += ["Tasks of lm-evaluation-harness, by the command `harness`.", harness]
    files = [(name, f"`{path.relative_to(recipe.root)}`") for name, path in paths.items()]
    sections = [
        Section("Result", result),
        _cut(plan, importance),
        _importance(plan, importance, trials, recipe.depth.method),
        *(
            [_training("correct", metrics["correct"], correction_gain(project, found))]
            if "correct" in metrics
            else []
        ),
        _training("distill", metrics["distill"], []),
        _cost(metrics, found_by_search, recipe, made),
        *([search_section(found_by_search, recipe.search.budget[0])] if recipe.search else []),
        Section(
            "Files",
            [Table(("what", "where"), [*files, ("this report, with figures", "`report.html`")], "left")],
        ),
        _made(recipe, project.stages, found, made),
    ]
    return Document(f"{recipe.model} compressed to {quality.rows[-1][2]}", headline(quality, found), sections)


def _cut(plan: PrunePlan, scores: Scores) -> Section:
    """Sizes, kept layers, and the share of the importance that the kept units hold."""
    shares = {axis.name: _shares(axis, plan, scores) for axis in AXES.values()}
    by_layer = {axis.name: shares[axis.name] for axis in AXES.values() if axis.per_layer}
    stays = "; ".join(_share_text(name, list(rows.values())) for name, rows in shares.items())
    return Section(
        "What was cut",
        [
            Table(("size", "teacher", "student", "kept"), plan.summary()),
            f"Layers dropped (from 0): {', '.join(map(str, plan.dropped)) or 'none'}.",
            f"Share of the importance score that stays: {stays}.",
            *(f"Note: {note}." for note in plan.notes),
            kept_layers(plan.teacher.num_layers, by_layer),
        ],
    )


def _shares(axis: Axis, plan: PrunePlan, scores: Scores) -> dict[int, float]:
    """Kept layer -> share of its importance that the kept units hold."""
    shares = {}
    for layer, units in plan.keep[axis.name].items():
        row = scores[axis.name][layer]
        shares[layer] = float(row[units].sum() / row.sum())
    return shares


def _share_text(name: str, shares: list[float]) -> str:
    spread = f" (layers from {min(shares):.1%} to {max(shares):.1%})" if len(shares) > 1 else ""
    return f"{name} {np.mean(shares):.1%}{spread}"


def _importance(plan: PrunePlan, scores: Scores, trials: DepthTrials | None, method: str) -> Section:
    """Figures only; the numbers are in importance.safetensors and depth.json."""
    cosine = dict(enumerate(scores.layers.tolist()))
    parts: list[Part] = [
        layer_bars("Layers: change of the hidden states", cosine, plan.dropped, "1 - cosine")
    ]
    if trials is not None:
        parts.append(_trials(method, trials, plan))
    return Section("Importance", [*parts, *unit_figures(plan, scores)])


def _trials(method: str, trials: DepthTrials, plan: PrunePlan) -> Figure:
    """What the trials were ranked by: accuracies with the metric task, losses otherwise."""
    if trials.base.accuracy is None:
        losses = [(trial.dropped, trial.loss) for trial in trials.trials]
        return trials_figure(method, trials.base.loss, losses, plan.layers)
    shares = [(trial.dropped, trial.accuracy or 0.0) for trial in trials.trials]
    unit = "accuracy (share of the items)"
    return trials_figure(method, trials.base.accuracy, shares, plan.layers, unit, better=1)


def _metrics(folder: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / CURVES[stage][1]).read_text().splitlines()]


def _spent(metrics: Sequence[Mapping[str, float]]) -> tuple[int, float]:
    """Tokens and seconds of a run."""
    return round(sum(m["num_tokens"] for m in metrics)), sum(m["step_time_s"] for m in metrics)


def _training(stage: str, metrics: list[dict[str, float]], before: list[Part]) -> Section:
    title, curve = CURVES[stage]
    if not metrics:
        return Section(title, [*before, "No steps were logged."])
    tokens, seconds = _spent(metrics)
    picked = [metrics[i] for i in sorted({round(x) for x in np.linspace(0, len(metrics) - 1, 11)})]
    columns = {
        "step": ("step", "d"),
        "loss": ("loss", ".4f"),
        "KL": ("kl", ".4f"),
        "learning rate": ("lr", ".2e"),
        "gradient norm": ("grad_norm", ".2f"),
    }
    if not any(m["kl"] for m in metrics):  # a run without a teacher
        del columns["KL"]
    rows = [[format(m[key], form) for key, form in columns.values()] for m in picked]
    return Section(
        title,
        [
            *before,
            f"{len(metrics)} steps, {tokens:,} tokens, {seconds / 60:.1f} minutes, {tokens / seconds:,.0f} tokens/s over all ranks. "
            f"The full curve: `{curve}`, `tensorboard/{stage}`.",
            *training_figure(title, metrics),
            Table(list(columns), rows),
        ],
    )


COST = ("stage", "steps", "tokens", "tokens/s", "hours of steps", "hours in all", "rank-hours")


def _cost(
    metrics: Mapping[str, list[dict[str, float]]],
    candidates: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    made: Mapping[str, RunRecord],
) -> Section:
    """A row a stage. candidates: of a search. made: how the stages ran."""
    spent = {stage: (len(own), *_spent(own)) for stage, own in metrics.items() if own}
    if distilled := [part for c in candidates for part in c["distilled"]]:
        steps = sum(last["steps"] for c in candidates if (last := _last(c)))
        spent["search"] = (
            steps,
            steps * recipe.distill.global_batch_size * recipe.data.sequence_length,
            sum(part["seconds"] for part in distilled),
        )
    rows, hours, rank_hours = [], 0.0, 0.0
    for stage in dict.fromkeys([*made, *spent]):
        training, whole = [""] * 4, [""] * 2
        if stage in spent:
            steps, tokens, seconds = spent[stage]
            training = [f"{steps:,}", f"{tokens:,}", f"{tokens / seconds:,.0f}", f"{seconds / 3600:.3f}"]
        if record := made.get(stage):
            own = record.seconds / 3600
            hours, rank_hours, whole = (
                hours + own,
                rank_hours + own * record.ranks,
                [f"{own:.3f}", f"{own * record.ranks:.3f}"],
            )
        rows.append((stage, *training, *whole))
    if made:
        rows.append(("together", "", "", "", "", f"{hours:.3f}", f"{rank_hours:.3f}"))
    said = (
        "Hours of steps: of the optimizer steps by the clock, in all commands together, without loading and saving (those of the search with its cuts, "
        "checkpoints and losses). Hours in all: of the command that finished a stage, so without what a stop had cut off. "
        "Rank-hours: times the ranks of its job. Stages whose record is lost are not in these two, nor in their sums."
    )
    return Section("Cost", [said, Table(COST, rows)])


def search_section(candidates: Sequence[Mapping[str, Any]], budget: str) -> Section:
    """Candidates of an architecture search, best first, and what they trade: parameters, memory where it is the budget, latency where it was measured,
    against loss.

    A candidate: name, arch (fields of Arch), parameters, memory_gib, pruned_loss, distilled ([{steps, loss}]), chosen, latency_s (or None). Losses in
    nats a token. Losses after different numbers of steps do not compare: a front is drawn among those distilled longest, and one among all as cut.
    """
    longest = max((last["steps"] for c in candidates if (last := _last(c))), default=0)
    measured = [c for c in candidates if all(math.isfinite(d["loss"]) for d in c["distilled"])]

    def order(c: Mapping[str, Any]) -> tuple[int, float]:
        last = _last(c)
        return (-last["steps"], last["loss"]) if last else (0, c["pruned_loss"])

    rows = []
    for c in sorted(candidates, key=order):
        last, arch = _last(c), c["arch"]
        sizes = [f"{arch[name]:,}" for name in ("num_layers", "hidden_size", "ffn_hidden_size")]
        sizes.append(f"{arch['num_attention_heads']} / {arch['num_query_groups']}")
        distilled = (f"{last['loss']:.4f}", f"{last['steps']:,}") if last else ("", "")
        latency = "" if c["latency_s"] is None else f"{c['latency_s'] * 1e3:.1f}"
        count, memory = f"{c['parameters']:,}", f"{c['memory_gib']:.2f}"
        rows.append(
            (
                c["name"],
                count,
                memory,
                *sizes,
                f"{c['pruned_loss']:.4f}",
                *distilled,
                latency,
                "yes" * c["chosen"],
            )
        )
    sizes_header = ("candidate", "parameters", "memory, GiB", "layers", "hidden", "ffn", "heads / groups")
    header = (*sizes_header, "loss as cut", "loss distilled", "steps", "latency (ms)", "chosen")
    scales = [("parameters (millions)", lambda c: c["parameters"] / 1e6)]
    if budget == "memory_gib":
        scales.append(("memory (GiB)", lambda c: c["memory_gib"]))
    if all(c["latency_s"] is not None for c in candidates):
        scales.append(("latency (ms)", lambda c: c["latency_s"] * 1e3))
    runs = [("as cut", measured, lambda c: c["pruned_loss"])]
    if longest:
        finalists = [c for c in measured if (last := _last(c)) and last["steps"] == longest]
        runs.append(
            (f"after {longest:,} steps of distillation", finalists, lambda c: (_last(c) or {})["loss"])
        )
    plots = []
    for label, of in scales:
        for when, group, loss in runs:
            points = [(c["name"], of(c), loss(c), c["chosen"]) for c in group]
            plots.append(
                pareto(
                    f"Loss {when} by {label.partition(' (')[0]}",
                    points,
                    label,
                    "loss (nats a token)",
                    front(points),
                )
            )
    said = "Candidates of the search, those distilled longest first, then by loss. A candidate is on the front when no other is at least as good on both axes."
    return Section("Search", [said, Table(header, rows), *plots])


def _last(candidate: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The distilled loss after the most steps."""
    return max(candidate["distilled"], key=lambda d: d["steps"], default=None)


def _made(
    recipe: Any, stages: Sequence[str], found: dict[str, Any], made: Mapping[str, RunRecord]
) -> Section:
    """Commands, recipe, versions: of the stages as they ran, where that is known."""
    from omegaconf import OmegaConf

    t, file = recipe.teacher, recipe.root / "recipe.yaml"
    ranks = found["speed"]["ranks"] if "speed" in found else recipe.parallel.model_ranks
    job = ranks + t.ranks_in(None) + sum(t.siblings.values())
    how = {
        stage: (record.launcher, record.layout_words(recipe))
        for stage, record in made.items()
        if stage != "plan"
    }
    usual = how.get(
        "distill", (f"torchrun --nproc-per-node {job} -m minitron_mp" if job > 1 else "minitron-mp", "")
    )
    whole = (
        [f"{usual[0]} compress {file}{usual[1]}", "", "# or stage by stage"]
        if len(set(how.values())) < 2
        else []
    )
    by_stage = {name: ("minitron-mp", "") if name == "plan" else how.get(name, usual) for name in stages}
    lines = [*whole, *(f"{start} {name} {file}{layout}" for name, (start, layout) in by_stage.items())]
    parts: list[Part] = [Code("\n".join([*lines, f"minitron-mp report {file}"]))]
    if lost := [name for name in stages if name not in made]:
        parts.append(
            f"No record is left of how {', '.join(lost)} ran ({FILE}); their ranks are those of the recipe's layout."
        )
    versions = _versions(made) or list(software().items())
    return Section(
        "How it was made",
        [
            *parts,
            "The recipe, with every default:",
            Code(OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump()))),
            Table(("what", "which"), versions, "left"),
        ],
    )


def _versions(made: Mapping[str, RunRecord]) -> list[tuple[str, str]]:
    """Software and device of the stages; where these differ, which had which."""
    known: dict[str, dict[str, list[str]]] = {}
    for stage, record in made.items():
        for name, value in {
            **record.software,
            **({"device": record.device} if record.device else {}),
        }.items():
            known.setdefault(name, {}).setdefault(value, []).append(stage)
    told = {
        name: list(own)
        if len(own) == 1
        else [f"{value} ({', '.join(stages)})" for value, stages in own.items()]
        for name, own in known.items()
    }
    return [(name, "; ".join(values)) for name, values in told.items()]
