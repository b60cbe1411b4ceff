"""Effect of teacher correction, for the report: on the teacher, and on the student.

The student is compared with the student of a run without correction, in the folder of
correct.baseline. The comparison is valid only if correction is the only difference between the two
runs. Their manifests are compared to check this.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from minitron_mp.artifacts.files import read_json
from minitron_mp.artifacts.manifest import Manifest, find_manifest, require_artifact
from minitron_mp.errors import differing_fields
from minitron_mp.report.document import Part
from minitron_mp.report.project import Project

Losses = Mapping[str, Mapping[str, Any]]
"""Text ("" for the held-out part, else " on NAME") -> model -> its quality."""


def correction_gain(project: Project, evaluation: Mapping[str, Any]) -> list[Part]:
    """Return paragraphs on the teacher's loss before and after correction and on the student's gain."""
    losses = _losses_by_text(evaluation)
    changes = []
    for text, models in losses.items():
        before = models["uncorrected"]["loss"]
        after = models["teacher"]["loss"]
        changes.append(
            f"held-out loss{text} changed from {before:.4f} to {after:.4f} ({after / before - 1:+.1%})"
        )
    if project.recipe.corrects_during_distillation:
        use = (
            "The student is pruned from the original model, and distilled from the teacher during correction."
        )
    else:
        use = "The student is pruned and distilled from the corrected teacher."
    parts: list[Part] = [f"The teacher was corrected: {'; '.join(changes)}. {use}"]
    if len(losses) == 1:
        parts.append(
            "The change of the teacher's loss on text like its original training data is unknown. "
            "To measure it, add such text to `data.held_out`."
        )
    return [*parts, *_compared_with_baseline(project, losses)]


def _losses_by_text(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    texts = evaluation.get("texts", {})
    return {"": evaluation, **{f" on {name}": models for name, models in texts.items()}}


def _compared_with_baseline(project: Project, losses: Losses) -> list[Part]:
    """Return paragraphs that compare the student with the student of the run without correction."""
    correct = project.recipe.correct
    assert correct is not None
    if project.recipe.earlier:
        return []  # the student of the baseline has no further rounds
    if correct.baseline is None:
        return [
            "How much the student gains from correction is unknown. To measure it, run the recipe "
            "without the section `correct` into another output folder, and set `correct.baseline` to "
            "that folder."
        ]
    baseline = project.without_correction()
    baseline_evaluation = read_json(baseline.paths["evaluate"], "evaluate")
    differences = _baseline_differences(baseline, project)
    if differences:
        return [
            f"The student of `{correct.baseline}` cannot show the effect of correction, because that run "
            f"also differs in other ways: {'; '.join(differences)}."
        ]
    common_texts = _common_texts(baseline, project)
    baseline_losses = {
        text: models
        for text, models in _losses_by_text(baseline_evaluation).items()
        if text == "" or text.removeprefix(" on ") in common_texts
    }
    rows = []
    for text in losses:
        if text in baseline_losses:
            loss = losses[text]["distilled"]["loss"]
            without = baseline_losses[text]["distilled"]["loss"]
            rows.append(
                f"held-out loss{text} is {loss:.4f}, without correction {without:.4f} "
                f"({loss / without - 1:+.1%})"
            )
    parts: list[Part] = [
        f"Compared with the student of `{correct.baseline}` (no correction): {'; '.join(rows)}."
    ]
    missing = [text.removeprefix(" on ") for text in losses if text not in baseline_losses]
    if missing:
        parts.append(
            f"That student was not evaluated on {', '.join(missing)}: run `evaluate` there with the same "
            "`data.held_out`."
        )
    return parts


def _baseline_differences(baseline: Project, project: Project) -> list[str]:
    """Return how the student in the baseline folder differs from the one that its recipe gives now.

    Only the stages that cause a difference are listed. A search may also have chosen other sizes.
    """
    overall = _manifest_differences(baseline, "evaluate", ())
    if overall:
        adds_results = baseline.stages["evaluate"].adds_results
        before = [name for name in baseline.before("evaluate") if not adds_results(name)]
        causes = [
            row
            for name in (*before, "evaluate")
            for row in _manifest_differences(baseline, name, baseline.stages)
        ]
        return causes or overall
    plans = [require_artifact(each.paths["plan"], "plan").arch for each in (baseline, project)]
    baseline_sizes, sizes = (arch.model_dump() if arch else {} for arch in plans)
    return [f"its {row}" for row in differing_fields(baseline_sizes, sizes)]


def _manifest_differences(baseline: Project, name: str, ignored_inputs: Collection[str]) -> list[str]:
    """Return how a stage's artifact differs from the recipe, for inputs and settings that change losses."""
    manifest = find_manifest(baseline.paths[name])
    if manifest is None:
        return []
    adds_results = baseline.stages[name].adds_results

    def relevant(manifest: Manifest) -> Manifest:
        inputs = {
            key: fingerprint
            for key, fingerprint in manifest.inputs.items()
            if key not in ignored_inputs and not adds_results(key)
        }
        settings = {key: value for key, value in manifest.settings.items() if not adds_results(key)}
        return manifest.model_copy(update={"inputs": inputs, "settings": settings})

    return [f"{name} {row}" for row in relevant(manifest).differences(relevant(baseline.manifest(name)))]


def _common_texts(baseline: Project, project: Project) -> set[str]:
    """Return the names in data.held_out whose text is the same in both evaluations."""
    texts = find_manifest(baseline.paths["texts"]) if "texts" in baseline.paths else None
    if texts is None:
        return set()
    evaluated = require_artifact(baseline.paths["evaluate"], "evaluate").inputs.get("texts")
    if evaluated != texts.fingerprint:
        return set()
    rows, baseline_rows = (
        set(manifest.inputs["text"].split(", ")) for manifest in (project.manifest("texts"), texts)
    )
    return {row.split()[0] for row in rows & baseline_rows}
