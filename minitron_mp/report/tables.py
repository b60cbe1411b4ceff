"""Results of a finished project as tables, for the report and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron_mp.artifacts.files import read_json
from minitron_mp.artifacts.manifest import Change, find_manifest, require_artifact
from minitron_mp.config.recipe import Recipe
from minitron_mp.models.arch import Arch
from minitron_mp.models.number_formats import BYTES
from minitron_mp.report.document import Table
from minitron_mp.report.project import Paths

Evaluation = Mapping[str, Any]
"""Content of evaluation.json."""

UNITS_NOTE = "Losses and KL(teacher || model) are averages in nats per token."

TASKS_NOTE = "Task scores (zero-shot, share of items, with standard errors):"

QUALITY_HEADER = (
    "model",
    "parameters",
    "of unpruned",
    "held-out loss",
    "perplexity",
    "KL to teacher",
    "weights",
)


def load_evaluation(paths: Paths) -> dict[str, Any]:
    """Read evaluation.json."""
    return read_json(paths["evaluate"], "evaluate --force")


def quality_table(recipe: Recipe, paths: Paths, *, speed: bool = True) -> Table:
    """Return a table with size, loss and KL of every evaluated model.

    The rows are: uncorrected teacher, teacher, unpruned model if it is not the teacher, students of
    earlier rounds, pruned student, distilled student. speed: add measured speeds, if `evaluate`
    measured them.
    """
    evaluation = load_evaluation(paths)
    models = recipe.evaluated_models
    stages = {"uncorrected": models.pop("uncorrected", "import"), "teacher": recipe.distillation_teacher}
    archs = {name: _arch(paths, stage) for name, stage in {**stages, **models}.items()}
    speed_columns = _speed_columns(evaluation) if speed else []
    rows = []
    for name, arch in archs.items():
        if name in evaluation:
            cells = _quality_cells(name, arch, recipe, _arch(paths, "import"), evaluation[name])
            rows.append([*cells, *(column.get(name, "") for _, column in speed_columns)])
    return Table([*QUALITY_HEADER, *(title for title, _ in speed_columns)], rows)


def _arch(paths: Paths, stage: str) -> Arch:
    arch = require_artifact(paths[stage], stage).arch
    assert arch is not None
    return arch


def _quality_cells(
    name: str, arch: Arch, recipe: Recipe, unpruned: Arch, quality: Mapping[str, Any]
) -> list[str]:
    """Return the cells of a row under QUALITY_HEADER."""
    count = arch.num_parameters()
    precision = recipe.teacher_precision if name == "teacher" else recipe.precision
    return [
        name,
        f"{count:,}",
        f"{count / unpruned.num_parameters():.1%}",
        f"{quality['loss']:.4f}",
        f"{quality['perplexity']:.2f}",
        "" if quality["kl"] is None else f"{quality['kl']:.4f}",
        f"{count * BYTES[precision] / 1e6:,.1f} MB {precision}",
    ]


def _speed_columns(evaluation: Evaluation) -> list[tuple[str, dict[str, str]]]:
    """Return (header, model -> tokens/s) of each measured shape; [] if speed was not measured."""
    if "speed" not in evaluation:
        return []
    models = evaluation["speed"]["models"]
    columns = []
    for i, shape in enumerate(next(iter(models.values()))):
        title = f"tokens/s, {shape['samples']}\u00a0x\u00a0{shape['sequence_length']}"
        columns.append(
            (title, {name: f"{speeds[i]['tokens_per_s']:,.0f}" for name, speeds in models.items()})
        )
    return columns


def speed_note(evaluation: Evaluation) -> list[str]:
    """Return a paragraph on the measurement of the speeds; [] if speed was not measured."""
    if "speed" not in evaluation:
        return []
    speed = evaluation["speed"]
    measurements = [row for rows in speed["models"].values() for row in rows]
    repeats = sorted({row["repeats"] for row in measurements})
    if repeats == [1]:
        passes = "One pass"
    else:
        count = f"{repeats[0]}" if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
        spread = max(row["spread"] for row in measurements)
        passes = f"Median of {count} passes, which differed by up to {spread:.0%},"
    ranks = "1 rank" if speed["ranks"] == 1 else f"{speed['ranks']} ranks"
    if speed["copies"] > 1:
        ranks += f" with {speed['copies']} replicas of the model"
    return [
        "Columns tokens/s, samples x tokens: throughput of one forward pass (prefill) over that many "
        "samples of that length, in this run's layout and without the output layer, which prefill needs "
        f"for one token per sample only. {passes} on {speed['device']}, {ranks}. Models of the same "
        "architecture share one measurement. The measurement uses no serving engine and no decoding, so "
        "compare rows with each other, not with other programs."
    ]


def tasks_table(evaluation: Evaluation) -> Table | None:
    """Return task scores with standard errors, one column per model; None without tasks."""
    tasks = evaluation.get("tasks", {})
    if not tasks:
        return None
    models = list(next(iter(tasks.values())))
    rows = []
    for task, results in tasks.items():
        first = results[models[0]]
        for key, label in (("accuracy", "accuracy"), ("normalised", "accuracy normalised by characters")):
            if first[key] is not None:
                scores = [
                    f"{results[model][key]:.1%} ± {results[model][key + '_stderr']:.1%}" for model in models
                ]
                rows.append((f"{task} ({first['num_items']:,}), {label}", *scores))
    return Table(("task (items)", *models), rows)


def changes_note(changes: Sequence[Change]) -> list[str]:
    """Return a sentence on the settings that changed during a training run; [] if none did."""
    rows = [
        f"{change.name} from {_setting(change.old)} to {_setting(change.new)} after step {change.step:,}"
        for change in changes
    ]
    return [f"Settings that changed during the run: {'; '.join(rows)}."] if rows else []


def _setting(value: object) -> str:
    return "its default" if value is None else f"{value:g}" if isinstance(value, float) else f"{value}"


HARNESS_HEADER = ("task", "version", "shots", "items", "metric", "value", "standard error")


def harness_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return rows under HARNESS_HEADER, one per task and metric.

    results: content of a file written by the command `harness`.
    """
    rows: list[tuple[str, ...]] = []
    for task, values in results["results"].items():
        version = str(results["versions"].get(task, ""))
        shots = str(results["n-shot"].get(task, ""))
        items = str(results["n-samples"].get(task, {}).get("effective", ""))
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}", "")
            label = metric if filter_name == "none" else f"{metric} ({filter_name})"
            rows.append((task, version, shots, items, label, _number(value), _number(error)))
    return rows


def _number(value: float | int | str) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def harness_table(root: Path, paths: Paths) -> Table | None:
    """Return the results of the command `harness` for the current models; None without any.

    Results of a model that was rebuilt later are not included.
    """
    rows: list[tuple[str, ...]] = []
    for path in sorted(root.glob("harness_*.json")):
        results = read_json(path, "harness")
        settings = results["manifest"]["settings"]
        if not _are_current(results["manifest"]["inputs"], paths):
            continue
        limit = f"first {settings['limit']} items" if settings["limit"] else ""
        name = f"{settings['model']}, step {settings['step']:,}" if "step" in settings else settings["model"]
        model = (name, f"{settings['max_length']:,}", limit)
        rows += [(*model, *row) for row in harness_rows(results)]
    if not rows:
        return None
    rows.sort(key=lambda row: (row[3], row[0]))  # by task, then by model
    return Table(("model", "max. tokens", "limit", *HARNESS_HEADER), rows)


def _are_current(inputs: Mapping[str, str], paths: Paths) -> bool:
    """Return whether the artifacts on disk have these fingerprints. inputs: stage -> fingerprint."""
    current = {}
    for stage in inputs:
        manifest = find_manifest(paths[stage]) if stage in paths else None
        if manifest:
            current[stage] = manifest.fingerprint
    return current == inputs


def texts_table(evaluation: Evaluation) -> Table | None:
    """Return losses on the texts of data.held_out, one column per model; None without such texts."""
    texts = evaluation.get("texts", {})
    if not texts:
        return None
    models = list(next(iter(texts.values())))
    rows = []
    for name, results in texts.items():
        losses = [f"{results[model]['loss']:.4f}" for model in models]
        rows.append((f"{name} ({results['teacher']['num_tokens']:,} tokens)", *losses))
    return Table(("text", *models), rows)


def headline(quality: Table, evaluation: Evaluation) -> str:
    """Return two sentences on the student with the numbers of the quality table."""
    rows = {row[0]: dict(zip(quality.header, row)) for row in quality.rows}
    student = rows["distilled"]
    start = "pruned student before distillation", "pruned"
    if "pruned" not in rows:
        start = "student before the last round", list(rows)[-2]
    return (
        f"The student has {student['parameters']} parameters, {student['of unpruned']} of the unpruned "
        f"model. On {evaluation['distilled']['num_tokens']:,} held-out tokens its perplexity is "
        f"{student['perplexity']} (teacher: {rows['teacher']['perplexity']}, {start[0]}: "
        f"{rows[start[1]]['perplexity']})."
    )
