"""report.md and report.html: what was cut, what it cost, and how good the student is. One document, written in two ways."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from minitron_mp import __version__, artifact, facts, figures, page
from minitron_mp.candidates import front
from minitron_mp.card import refresh
from minitron_mp.config import Recipe
from minitron_mp.console import say, table
from minitron_mp.page import Code, Document, Part, Section, Table
from minitron_mp.plan import Importance, PrunePlan, Trials

LIBRARIES = ("torch", "megatron-core", "transformers", "numpy")
CURVES = {"correct": ("Teacher correction", "metrics_correct.jsonl"), "distill": ("Distillation", "metrics.jsonl")}
"""Stages that train: title of their section, file of their metrics."""


def write_report(project: Any) -> None:
    """Read a finished project's artefacts and write report.md and report.html beside them; one process."""
    document, root = collect(project), project.recipe.root
    result = next(part for part in document.sections[0].parts if isinstance(part, Table))
    table("result", result.header, result.rows)
    for name, write in (("report.md", page.markdown), ("report.html", page.html)):
        artifact.write_text(root / name, write(document))
    refresh(project)  # evaluate may have run again since the export
    say(f"report: {root / 'report.md'}, {root / 'report.html'}")


def collect(project: Any) -> Document:
    """All that the report says. project: pipeline.Project, finished."""
    recipe, paths = project.recipe, project.paths
    plan, importance, found = PrunePlan.load(paths["plan"]), Importance.load(paths["score"]), facts.evaluation(paths)
    trials = Trials.load(paths["depth"]) if "depth" in paths else None
    left_by = {"correct": "distill" if recipe.corrects_meanwhile else "correct", "distill": "distill"}
    metrics = {stage: _metrics(paths[folder], stage) for stage, folder in left_by.items() if stage == "distill" or recipe.correct}
    found_by_search = artifact.read_json(paths["search"], "search --force")["candidates"] if "search" in paths else []
    quality, tasks, texts = facts.quality(recipe, paths), facts.tasks(found), facts.texts(found)
    result: list[Part] = [
        f"On {found['pruned']['num_tokens']:,} held-out tokens. Losses and KL(teacher || model) are means in nats a token.",
        quality,
        *facts.speed_note(found),
    ]
    if tasks is not None:
        result += ["Scores in tasks: shares of the items, zero-shot, with standard errors.", tasks]
    if texts is not None:
        result += ["Losses on further held-out texts, in nats a token.", texts]
    if (harness := facts.harness(recipe.root, paths)) is not None:
        result += ["Tasks of lm-evaluation-harness, by the command `harness`.", harness]
    files = [(name, f"`{path.relative_to(recipe.root)}`") for name, path in paths.items()]
    sections = [
        Section("Result", result),
        _cut(plan, importance),
        _importance(plan, importance, trials, recipe.depth.method),
        *([_training("correct", metrics["correct"], [_bought(found, meanwhile=recipe.corrects_meanwhile)])] if "correct" in metrics else []),
        _training("distill", metrics["distill"], []),
        _cost(metrics, found_by_search, recipe),
        *([search_section(found_by_search, recipe.search.budget[0])] if recipe.search else []),
        Section("Files", [Table(("what", "where"), [*files, ("this report, with figures", "`report.html`")], "left")]),
        _made(recipe, project.stages, found),
    ]
    return Document(f"{recipe.model} compressed to {quality.rows[-1][2]}", facts.headline(quality, found), sections)


def _cut(plan: PrunePlan, importance: Importance) -> Section:
    """Sizes, kept layers, and the share of the importance that the kept channels hold."""
    dropped = _dropped(plan)
    shares = {
        axis: {layer: float(scores[layer][keep].sum() / scores[layer].sum()) for layer, keep in zip(plan.layers, rows)}
        for axis, scores, rows in (("ffn", importance.ffn, plan.ffn), ("heads", importance.heads, plan.heads))
    }
    hidden = importance.hidden[plan.hidden].sum() / importance.hidden.sum()
    ffn, heads = (np.array(list(values.values())) for values in shares.values())
    return Section(
        "What was cut",
        [
            Table(("size", "teacher", "student", "kept"), plan.summary()),
            f"Layers dropped (from 0): {', '.join(map(str, dropped)) or 'none'}.",
            f"Share of the importance score that stays: hidden {hidden:.1%}; ffn {ffn.mean():.1%} "
            f"(layers from {ffn.min():.1%} to {ffn.max():.1%}); heads {heads.mean():.1%}.",
            *(f"Note: {note}." for note in plan.notes),
            figures.kept_layers(plan.teacher.num_layers, shares),
        ],
    )


def _dropped(plan: PrunePlan) -> list[int]:
    return sorted(set(range(plan.teacher.num_layers)) - set(plan.layers))


def _importance(plan: PrunePlan, importance: Importance, trials: Trials | None, method: str) -> Section:
    """Figures only; the numbers are in importance.safetensors and depth.json."""
    teacher, student = plan.teacher, plan.student
    groups = importance.heads.reshape(-1, teacher.heads_per_group) if teacher.heads_per_group > 1 else importance.heads
    per_group = student.heads_per_group if groups is not importance.heads else teacher.num_attention_heads  # alone in their groups none is cut
    parts: list[Part] = [
        figures.layer_bars("Layers: change of the hidden states", dict(enumerate(importance.layers.tolist())), _dropped(plan), "1 - cosine"),
        *([_trials(method, trials, plan)] if trials else []),
        figures.curve("Hidden channels", importance.hidden[None], student.hidden_size, "channel"),
        figures.curve("Neurons (ffn), a line a layer", importance.ffn, student.ffn_hidden_size, "neuron"),
        figures.curve("Heads, a line a query group", groups, per_group, "head"),
        figures.heat_by_rank("Neurons of each layer", importance.ffn, student.ffn_hidden_size, "neurons"),
        figures.heat_heads("Heads of each layer", importance.heads, dict(zip(plan.layers, plan.heads))),
    ]
    return Section("Importance", parts)


def _trials(method: str, trials: Trials, plan: PrunePlan) -> page.Figure:
    """By what decided: accuracies where a task was the measure."""
    if trials.base_accuracy is None:
        return figures.trials(method, trials.base, trials.trials, plan.layers)
    shares = [(layers, share) for (layers, _), share in zip(trials.trials, trials.accuracies)]
    return figures.trials(method, trials.base_accuracy, shares, plan.layers, "accuracy (share of the items)", better=1)


def _bought(found: dict[str, Any], *, meanwhile: bool) -> str:
    """What the teacher gained by its correction, and lost on other texts."""
    told = {"": found, **{f" on {name}": models for name, models in found.get("texts", {}).items()}}
    parts = []
    for where, models in told.items():
        before, after = (models[name]["loss"] for name in ("uncorrected", "teacher"))
        parts.append(f"its held-out loss{where} went from {before:.4f} to {after:.4f} ({after / before - 1:+.1%})")
    what = "is distilled from it while it learns, and cut from the original" if meanwhile else "is cut and distilled from it"
    return f"The teacher was corrected: {'; '.join(parts)}. The student {what}."


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
    columns = {"step": ("step", "d"), "loss": ("loss", ".4f"), "KL": ("kl", ".4f"), "learning rate": ("lr", ".2e"), "gradient norm": ("grad_norm", ".2f")}
    if not any(m["kl"] for m in metrics):  # a run without a teacher
        del columns["KL"]
    rows = [[format(m[key], form) for key, form in columns.values()] for m in picked]
    return Section(
        title,
        [
            *before,
            f"{len(metrics)} steps, {tokens:,} tokens, {seconds / 60:.1f} minutes, {tokens / seconds:,.0f} tokens/s over all ranks. "
            f"The full curve: `{curve}`, `tensorboard/{stage}`.",
            *figures.training(title, metrics),
            Table(list(columns), rows),
        ],
    )


def _cost(metrics: Mapping[str, list[dict[str, float]]], candidates: Sequence[Mapping[str, Any]], recipe: Recipe) -> Section:
    """Time of the optimizer steps, over all ranks; without loading, saving and the other stages. candidates: of a search."""
    rows = []
    if distilled := [part for c in candidates for part in c["distilled"]]:
        steps, seconds = sum(last["steps"] for c in candidates if (last := _last(c))), sum(part["seconds"] for part in distilled)
        tokens = steps * recipe.distill.global_batch_size * recipe.data.sequence_length
        rows.append(("search, all students", f"{steps:,}", f"{tokens:,}", f"{seconds / 3600:.3f}", f"{tokens / seconds:,.0f}"))
    for stage, own in metrics.items():
        if own:
            tokens, seconds = _spent(own)
            rows.append((stage, f"{len(own):,}", f"{tokens:,}", f"{seconds / 3600:.3f}", f"{tokens / seconds:,.0f}"))
    said = "Of the optimizer steps, by the clock; loading, saving and the other stages are not in it."
    if distilled:
        said += " The search's time has its cuts, checkpoints and losses in it."
    parts: list[Part] = [said]
    return Section("Cost", [*parts, Table(("stage", "steps", "tokens", "hours", "tokens/s"), rows)])


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
        rows.append((c["name"], count, memory, *sizes, f"{c['pruned_loss']:.4f}", *distilled, latency, "yes" * c["chosen"]))
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
        runs.append((f"after {longest:,} steps of distillation", finalists, lambda c: (_last(c) or {})["loss"]))
    plots = []
    for label, of in scales:
        for when, group, loss in runs:
            points = [(c["name"], of(c), loss(c), c["chosen"]) for c in group]
            plots.append(figures.pareto(f"Loss {when} by {label.partition(' (')[0]}", points, label, "loss (nats a token)", front(points)))
    said = "Candidates of the search, those distilled longest first, then by loss. A candidate is on the front when no other is at least as good on both axes."
    return Section("Search", [said, Table(header, rows), *plots])


def _last(candidate: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The distilled loss after the most steps."""
    return max(candidate["distilled"], key=lambda d: d["steps"], default=None)


def _made(recipe: Any, stages: Sequence[str], found: dict[str, Any]) -> Section:
    """Commands, recipe, versions."""
    from omegaconf import OmegaConf

    t, file = recipe.teacher, recipe.root / "recipe.yaml"
    ranks = found["speed"]["ranks"] if "speed" in found else recipe.parallel.model_ranks
    job = ranks + t.ranks_in(None) + sum(t.siblings.values())
    start = f"torchrun --nproc-per-node {job} -m minitron_mp" if job > 1 else "minitron-mp"
    lines = [f"{start} compress {file}", "", "# or stage by stage", *(f"{start if name != 'plan' else 'minitron-mp'} {name} {file}" for name in stages)]
    return Section(
        "How it was made",
        [
            Code("\n".join([*lines, f"minitron-mp report {file}"])),
            "The recipe, with every default:",
            Code(OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump()))),
            Table(("software", "version"), _software(), "left"),
        ],
    )


def _software() -> list[tuple[str, str]]:
    return [("Python", platform.python_version()), ("minitron-mp", __version__), *((name, _version(name)) for name in LIBRARIES)]


def _version(name: str) -> str:
    try:
        return version(name)
    except Exception:
        return "not installed as a package"
