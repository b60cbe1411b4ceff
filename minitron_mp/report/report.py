"""report.md and report.html: the pruned sizes, the cost of the run, and the student's quality."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from minitron_mp.artifacts.curves import CORRECTION, DISTILLATION, Curve
from minitron_mp.artifacts.files import read_json, write_text
from minitron_mp.artifacts.manifest import require_artifact
from minitron_mp.artifacts.run_log import records_of
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.rounds import of_round
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
from minitron_mp.report.rounds import Round, rounds_section, rounds_up_to
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
    root = project.recipe.run.root
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
    rounds = rounds_up_to(recipe, paths)
    evaluation = load_evaluation(paths)
    run_log = records_of(recipe.run.root, paths)
    quality = quality_table(recipe, paths)

    sections = [Section("Result", _result_parts(recipe, paths, evaluation, quality))]
    if len(rounds) > 1:
        sections.append(rounds_section(rounds, evaluation))
    for each in rounds:
        sections += _pruning_sections(each)
    curves: dict[str, list[Metrics]] = {}
    for each, stage, curve in _training_runs(project, rounds):
        metrics = _read_jsonl(each.paths[stage] / curve.file)
        before = correction_gain(project, evaluation) if curve == CORRECTION else []
        if curve == DISTILLATION or stage == "correct":
            command = each.recipe.command(stage)
            before += changes_note(require_artifact(each.paths[stage], command).changes)
        section = training_section(curve, metrics, before, each.recipe.distill.divergence)
        sections.append(each.titled(section) if stage == "distill" else section)
        name = curve.name if each is rounds[-1] else of_round(curve.name, each.recipe.round_name)
        curves[name] = metrics
    candidates = _candidates(paths)
    sections.append(cost_section(curves, candidates, recipe, run_log))
    for each in rounds:
        if each.recipe.search:
            section = search_section(_candidates(each.paths), each.recipe.search.budget[0])
            sections.append(each.titled(section))
    sections.append(_files_section(recipe, paths))
    num_ranks = evaluation["speed"]["ranks"] if "speed" in evaluation else None
    sections.append(provenance_section(project, num_ranks, run_log))
    title = f"{recipe.model} compressed to {quality.rows[-1][2]}"
    return Document(title, headline(quality, evaluation), sections)


def _pruning_sections(each: Round) -> list[Section]:
    """Return the sections on the plan and the scores of a round; [] if it does not prune."""
    if not each.recipe.prunes:
        return []
    plan, scores = PrunePlan.load(each.paths["plan"]), Scores.load(each.paths["score"])
    trials = DepthTrials.load(each.paths["depth"]) if "depth" in each.paths else None
    sections = (
        pruned_section(plan, scores),
        importance_section(plan, scores, trials, each.recipe.depth.method),
    )
    return [each.titled(section) for section in sections]


def _training_runs(project: Project, rounds: Sequence[Round]) -> list[tuple[Round, str, Curve]]:
    """Return (round, stage, curve) of each training run, in the order in which they ran."""
    last = [
        (rounds[-1], name, curve)
        for name, stage in project.stages.items()
        for curve in stage.curves(project.recipe)
    ]
    earlier = [(each, "distill", DISTILLATION) for each in rounds[:-1]]
    before = [run for run in last if run[1] != "distill"]  # the correction of the teacher
    return [*before, *earlier, *last[len(before) :]]


def _candidates(paths: Paths) -> list[Candidate]:
    """Return the candidates of a search; [] without one."""
    if "search" not in paths:
        return []
    candidates: list[Candidate] = read_json(paths["search"], "search --force")["candidates"]
    return candidates


def _result_parts(recipe: Recipe, paths: Paths, evaluation: Evaluation, quality: Table) -> list[Part]:
    parts: list[Part] = [
        f"Measured on {evaluation['distilled']['num_tokens']:,} held-out tokens. {UNITS_NOTE}",
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
    rows = [(stage, f"`{path.relative_to(recipe.run.root)}`") for stage, path in paths.items()]
    rows.append(("this report, with figures", "`report.html`"))
    return Section("Files", [Table(("stage", "file or folder"), rows, "left")])


def _read_jsonl(path: Path) -> list[Metrics]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
