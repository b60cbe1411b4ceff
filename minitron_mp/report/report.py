"""report.md and report.html: the pruned sizes, the cost of the run, and the student's quality."""

from __future__ import annotations

import json
from pathlib import Path

from minitron_mp.artifacts.curves import CORRECTION
from minitron_mp.artifacts.files import read_json, write_text
from minitron_mp.artifacts.manifest import require_artifact
from minitron_mp.artifacts.run_log import records_of
from minitron_mp.config.recipe import Recipe
from minitron_mp.console import say, table
from minitron_mp.pruning.depth import DepthTrials
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.pruning.scores import Scores
from minitron_mp.report.correction_gain import correction_gain
from minitron_mp.report.document import Document, Part, Section, Table, html, markdown
from minitron_mp.report.importance_section import importance_section, pruned_section
from minitron_mp.report.model_card import refresh_model_card
from minitron_mp.report.project import Paths, Project
from minitron_mp.report.provenance_section import provenance_section
from minitron_mp.report.search_section import Candidate, search_section
from minitron_mp.report.tables import (
    TASKS_NOTE,
    UNITS_NOTE,
    Evaluation,
    changes_note,
    harness_table,
    headline,
    load_evaluation,
    quality_table,
    speed_note,
    tasks_table,
    texts_table,
)
from minitron_mp.report.training_section import Metrics, cost_section, training_section


def write_report(project: Project) -> None:
    """Write report.md and report.html of a finished project beside its artifacts; for one process."""
    document = build_report(project)
    root = project.recipe.root
    result = next(part for part in document.sections[0].parts if isinstance(part, Table))
    table("result", result.header, result.rows)
    write_text(root / "report.md", markdown(document))
    write_text(root / "report.html", html(document))
    refresh_model_card(project)  # evaluate may have run again since the export
    say(f"report: {root / 'report.md'}, {root / 'report.html'}")


def build_report(project: Project) -> Document:
    """Build the report of a finished project from its artifacts."""
    recipe = project.recipe
    paths = project.paths
    plan = PrunePlan.load(paths["plan"])
    scores = Scores.load(paths["score"])
    evaluation = load_evaluation(paths)
    trials = DepthTrials.load(paths["depth"]) if "depth" in paths else None
    candidates: list[Candidate] = []
    if "search" in paths:
        candidates = read_json(paths["search"], "search --force")["candidates"]
    metrics = {
        curve: _read_jsonl(paths[name] / curve.file)
        for name, stage in project.stages.items()
        for curve in stage.curves(recipe)
    }
    run_log = records_of(recipe.root, paths)
    quality = quality_table(recipe, paths)

    sections = [
        Section("Result", _result_parts(recipe, paths, evaluation, quality)),
        pruned_section(plan, scores),
        importance_section(plan, scores, trials, recipe.depth.method),
    ]
    changes = {
        stage.curves(recipe)[-1]: changes_note(require_artifact(paths[name], name).changes)
        for name, stage in project.stages.items()
        if stage.curves(recipe)
    }
    for curve, rows in metrics.items():
        before = correction_gain(project, evaluation) if curve == CORRECTION else []
        before += changes.get(curve, [])
        sections.append(training_section(curve, rows, before, recipe.distill.divergence))
    curves = {curve.name: rows for curve, rows in metrics.items()}
    sections.append(cost_section(curves, candidates, recipe, run_log))
    if recipe.search:
        sections.append(search_section(candidates, recipe.search.budget[0]))
    sections.append(_files_section(recipe, paths))
    num_ranks = evaluation["speed"]["ranks"] if "speed" in evaluation else None
    sections.append(provenance_section(project, num_ranks, run_log))
    title = f"{recipe.model} compressed to {quality.rows[-1][2]}"
    return Document(title, headline(quality, evaluation), sections)


def _result_parts(recipe: Recipe, paths: Paths, evaluation: Evaluation, quality: Table) -> list[Part]:
    parts: list[Part] = [
        f"Measured on {evaluation['pruned']['num_tokens']:,} held-out tokens. {UNITS_NOTE}",
        quality,
        *speed_note(evaluation),
    ]
    for title, results in (
        (TASKS_NOTE, tasks_table(evaluation)),
        ("Losses on the texts of `data.held_out`, in nats per token:", texts_table(evaluation)),
        ("Tasks of lm-evaluation-harness (command `harness`):", harness_table(recipe.root, paths)),
    ):
        if results is not None:
            parts += [title, results]
    return parts


def _files_section(recipe: Recipe, paths: Paths) -> Section:
    rows = [(stage, f"`{path.relative_to(recipe.root)}`") for stage, path in paths.items()]
    rows.append(("this report, with figures", "`report.html`"))
    return Section("Files", [Table(("stage", "file or folder"), rows, "left")])


def _read_jsonl(path: Path) -> list[Metrics]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
