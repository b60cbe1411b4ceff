"""report.md: what was cut, what it cost, and how good the student is."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from minitron_mp import __version__, artifact
from minitron_mp.console import say, table
from minitron_mp.plan import Importance, PrunePlan

LIBRARIES = ("torch", "megatron-core", "transformers", "numpy")


def write_report(project: Any) -> None:
    """Read a finished project's artefacts and write report.md beside them; one process."""
    recipe, root = project.recipe, project.recipe.root
    plan = PrunePlan.load(project.paths["plan"])
    quality = quality_rows(project)
    table("result", QUALITY_HEADER, quality)
    parts = [
        f"# {recipe.model} compressed to {plan.student.num_parameters() / plan.teacher.num_parameters():.1%}",
        "## Result",
        f"On {_evaluation(project)['pruned']['num_tokens']:,} held-out tokens. Losses and KL(teacher || model) are means in nats a token.",
        markdown(QUALITY_HEADER, quality),
        *_tasks(project),
        "## What was cut",
        markdown(("size", "teacher", "student", "kept"), plan.summary()),
        *_cuts(plan, Importance.load(project.paths["score"])),
        *(["## Teacher correction", _bought(project), *_training(project, "correct", "metrics_correct.jsonl")] if recipe.correct else []),
        "## Distillation",
        *_training(project, "distill", "metrics.jsonl"),
        "## Files",
        markdown(("what", "where"), [(name, f"`{path.relative_to(root)}`") for name, path in project.paths.items()]),
        "## How it was made",
        "`minitron-mp compress recipe.yaml` with the recipe in `recipe.yaml`, on",
        markdown(("software", "version"), _software()),
    ]
    artifact.write_text(root / "report.md", "\n\n".join(parts) + "\n")
    say(f"report: {root / 'report.md'}")


QUALITY_HEADER = ("model", "parameters", "of teacher", "held-out loss", "perplexity", "KL to teacher")


def quality_rows(project: Any) -> list[tuple[str, ...]]:
    """One row a model: the teacher before its correction, where it had one, teacher, what was cut, where that is another model, pruned, distilled."""
    plan, evaluation = PrunePlan.load(project.paths["plan"]), _evaluation(project)
    rows = []
    tutor = artifact.require(project.paths[project.recipe.tutor], project.recipe.tutor).arch
    rows_of = {"uncorrected": plan.teacher, "teacher": tutor, "unpruned": plan.teacher, "pruned": plan.student, "distilled": plan.student}
    for name, arch in rows_of.items():
        if name not in evaluation:
            continue
        q, count = evaluation[name], arch.num_parameters()
        kl = "" if q["kl"] is None else f"{q['kl']:.4f}"
        rows.append((name, f"{count:,}", f"{count / plan.teacher.num_parameters():.1%}", f"{q['loss']:.4f}", f"{q['perplexity']:.2f}", kl))
    return rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _evaluation(project: Any) -> dict[str, Any]:
    return artifact.read_json(project.paths["evaluate"], "evaluate --force")


def _cuts(plan: PrunePlan, importance: Importance) -> list[str]:
    """Sentences on kept layers, and on the share of the importance that the kept channels hold."""
    dropped = sorted(set(range(plan.teacher.num_layers)) - set(plan.layers))
    lines = [f"Layers dropped (from 0): {', '.join(map(str, dropped)) or 'none'}."]
    hidden = importance.hidden[plan.hidden].sum() / importance.hidden.sum()
    ffn = np.array([importance.ffn[layer][keep].sum() / importance.ffn[layer].sum() for layer, keep in zip(plan.layers, plan.ffn)])
    heads = np.array([importance.heads[layer][keep].sum() / importance.heads[layer].sum() for layer, keep in zip(plan.layers, plan.heads)])
    lines.append(
        f"Share of the importance score that stays: hidden {hidden:.1%}; ffn {ffn.mean():.1%} "
        f"(layers from {ffn.min():.1%} to {ffn.max():.1%}); heads {heads.mean():.1%}."
    )
    return lines + [f"Note: {note}." for note in plan.notes]


def _tasks(project: Any) -> list[str]:
    """A table of task scores with standard errors, one column a model."""
    tasks = _evaluation(project).get("tasks", {})
    if not tasks:
        return []
    models = list(next(iter(tasks.values())))
    rows = []
    for task, results in tasks.items():
        for name, label in (("accuracy", "accuracy"), ("normalised", "accuracy by characters")):
            if results[models[0]][name] is not None:
                shares = [f"{results[model][name]:.1%} ± {results[model][name + '_stderr']:.1%}" for model in models]
                rows.append((f"{task} ({results[models[0]]['num_items']:,}), {label}", *shares))
    return ["## Tasks", "Shares of the items, zero-shot, with standard errors.", markdown(("task (items)", *models), rows)]


def _bought(project: Any) -> str:
    """A sentence on what the teacher gained by its correction."""
    before, after = (_evaluation(project)[name]["loss"] for name in ("uncorrected", "teacher"))
    return f"The teacher's held-out loss went from {before:.4f} to {after:.4f} ({after / before - 1:+.1%}); everything below is cut and distilled from it."


def _training(project: Any, stage: str, curve: str) -> list[str]:
    metrics = [json.loads(line) for line in (project.paths[stage] / curve).read_text().splitlines()]
    if not metrics:
        return ["No steps were logged."]
    tokens, seconds = sum(m["num_tokens"] for m in metrics), sum(m["step_time_s"] for m in metrics)
    picked = [metrics[i] for i in sorted({round(x) for x in np.linspace(0, len(metrics) - 1, 11)})]
    rows = [(str(m["step"]), f"{m['loss']:.4f}", f"{m['kl']:.4f}", f"{m['lr']:.2e}", f"{m['grad_norm']:.2f}") for m in picked]
    return [
        f"{len(metrics)} steps, {tokens:,} tokens, {seconds / 60:.1f} minutes, {tokens / seconds:,.0f} tokens/s over all ranks. "
        f"The full curve: `{curve}`, `tensorboard/{stage}`.",
        markdown(("step", "loss", "KL", "learning rate", "gradient norm"), rows),
    ]


def _software() -> list[tuple[str, str]]:
    return [("Python", platform.python_version()), ("minitron-mp", __version__), *((name, _version(name)) for name in LIBRARIES)]


def _version(name: str) -> str:
    try:
        return version(name)
    except Exception:
        return "not installed as a package"
