"""What a finished project says about its models, as rows: the report and the model card take them from here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_mp.artifacts.files import read_json
from minitron_mp.artifacts.manifest import find_manifest, require_artifact
from minitron_mp.config.recipe import Recipe
from minitron_mp.models.arch import Arch
from minitron_mp.models.number_formats import BYTES
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.report.document import Table

Paths = Mapping[str, Path]
"""Stage -> artefact."""


def evaluation(paths: Paths) -> dict[str, Any]:
    """Content of evaluation.json."""
    return read_json(paths["evaluate"], "evaluate --force")


def quality_table(recipe: Recipe, paths: Paths, *, speed: bool = True) -> Table:
    """One row a model: the teacher before its correction, where it had one, teacher, what was cut, where that is another model, pruned, distilled.

    speed: with the measured one, where evaluate has measured it.
    """
    plan, found = PrunePlan.load(paths["plan"]), evaluation(paths)
    tutor = require_artifact(paths[recipe.distillation_teacher], recipe.distillation_teacher).arch
    assert tutor is not None
    archs = {
        "uncorrected": plan.teacher,
        "teacher": tutor,
        "unpruned": plan.teacher,
        "pruned": plan.student,
        "distilled": plan.student,
    }
    shapes, rates = _rates(found) if speed else ([], {})
    rows = [
        _row(name, arch, recipe, plan.teacher, found[name], rates.get(name, []))
        for name, arch in archs.items()
        if name in found
    ]
    header = ["model", "parameters", "of unpruned", "held-out loss", "perplexity", "KL to teacher", "weights"]
    return Table(
        [*header, *(f"tokens/s, {samples}\u00a0x\u00a0{length}" for samples, length in shapes)], rows
    )


def _row(name: str, arch: Arch, recipe: Recipe, base: Arch, q: dict[str, Any], rates: list[str]) -> list[str]:
    count, precision = (
        arch.num_parameters(),
        recipe.teacher_precision if name == "teacher" else recipe.precision,
    )
    kl, weights = (
        "" if q["kl"] is None else f"{q['kl']:.4f}",
        f"{count * BYTES[precision] / 1e6:,.1f} MB {precision}",
    )
    return [
        name,
        f"{count:,}",
        f"{count / base.num_parameters():.1%}",
        f"{q['loss']:.4f}",
        f"{q['perplexity']:.2f}",
        kl,
        weights,
        *rates,
    ]


def _rates(found: dict[str, Any]) -> tuple[list[tuple[int, int]], dict[str, list[str]]]:
    """Shapes (samples, sequence length), and model -> tokens/s of each; none from an evaluation that did not measure."""
    models = found["speed"]["models"] if "speed" in found else {"": []}
    shapes = [(one["samples"], one["sequence_length"]) for one in next(iter(models.values()))]
    return shapes, {
        name: [f"{one['tokens_per_s']:,.0f}" for one in measured] for name, measured in models.items()
    }


def speed_note(found: dict[str, Any]) -> list[str]:
    """A sentence on how the speeds were measured; none when they were not."""
    if "speed" not in found:
        return []
    speed = found["speed"]
    measured = [one for models in speed["models"].values() for one in models]
    repeats = sorted({one["repeats"] for one in measured})
    times = " to ".join(map(str, dict.fromkeys([repeats[0], repeats[-1]])))
    spread = (
        f"the median of {times} passes, which differed by up to {max(one['spread'] for one in measured):.0%}"
    )
    passes = "one pass" if repeats == [1] else spread
    place = f"{speed['ranks']} rank{'s' * (speed['ranks'] > 1)}" + (
        f", {speed['copies']} copies of the model side by side" if speed["copies"] > 1 else ""
    )
    return [
        "tokens/s, samples x tokens: measured forward passes of so many samples at once (prefill) in this run's layout, without the output layer, "
        f"which prefill needs for one token of a sample; {passes} on {speed['device']}; {place}. Models of one "
        "architecture share a measurement. No serving engine, no decoding: compare the rows, not other programs."
    ]


def tasks_table(found: dict[str, Any]) -> Table | None:
    """Task scores with standard errors, one column a model; None without tasks."""
    scores = found.get("tasks", {})
    if not scores:
        return None
    models, rows = list(next(iter(scores.values()))), []
    for task, results in scores.items():
        for name, label in (("accuracy", "accuracy"), ("normalised", "accuracy by characters")):
            if results[models[0]][name] is not None:
                shares = [
                    f"{results[model][name]:.1%} ± {results[model][name + '_stderr']:.1%}" for model in models
                ]
                rows.append((f"{task} ({results[models[0]]['num_items']:,}), {label}", *shares))
    return Table(("task (items)", *models), rows)


HARNESS = ("task", "version", "shots", "items", "metric", "value", "standard error")


def harness_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """One a task and metric, under HARNESS. found: content of a file of the command `harness`."""
    rows: list[tuple[str, ...]] = []
    for task, values in found["results"].items():
        about = (
            str(found["versions"].get(task, "")),
            str(found["n-shot"].get(task, "")),
            str(found["n-samples"].get(task, {}).get("effective", "")),
        )
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{filtered}", "")
                rows.append(
                    (
                        task,
                        *about,
                        metric if filtered == "none" else f"{metric} ({filtered})",
                        _number(value),
                        _number(error),
                    )
                )
    return rows


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def harness_table(root: Path, paths: Paths) -> Table | None:
    """What the command `harness` has found of the models as they are now, one row a model, task and metric; None without any."""
    rows: list[tuple[str, ...]] = []
    for path in sorted(root.glob("harness_*.json")):
        found = read_json(path, "harness")
        made, settings = found["manifest"]["inputs"], found["manifest"]["settings"]
        now = {stage: find_manifest(paths[stage]) for stage in made if stage in paths}
        if {stage: manifest.fingerprint for stage, manifest in now.items() if manifest} == made:
            limited = f"first {settings['limit']} items" if settings["limit"] else ""
            rows += [
                (settings["model"], f"{settings['max_length']:,}", limited, *row)
                for row in harness_rows(found)
            ]
    return (
        Table(("model", "tokens at most", "limit", *HARNESS), sorted(rows, key=lambda row: (row[3], row[0])))
        if rows
        else None
    )


def texts_table(found: dict[str, Any]) -> Table | None:
    """Losses on the texts of data.held_out, one column a model; None without any."""
    judged = found.get("texts", {})
    if not judged:
        return None
    models = list(next(iter(judged.values())))
    rows = [
        (
            f"{name} ({results['teacher']['num_tokens']:,} tokens)",
            *(f"{results[model]['loss']:.4f}" for model in models),
        )
        for name, results in judged.items()
    ]
    return Table(("text", *models), rows)


def headline(table: Table, found: dict[str, Any]) -> str:
    """One sentence on the student, in the words of the table of quality()."""
    rows = {row[0]: dict(zip(table.header, row)) for row in table.rows}
    teacher, pruned, student = (rows[name] for name in ("teacher", "pruned", "distilled"))
    return (
        f"The student has {student['parameters']} parameters, {student['of unpruned']} of what it was cut from; on "
        f"{found['distilled']['num_tokens']:,} held-out tokens its perplexity is {student['perplexity']}, "
        f"the teacher's is {teacher['perplexity']}, and it was {pruned['perplexity']} before distillation."
    )
