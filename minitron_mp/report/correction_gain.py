"""What a teacher correction bought, for the report: the teacher before and after it, the student with and without it.

The run without it is in a folder of its own. It is a measure where it differs in nothing else, which the manifests there tell.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from minitron_mp.artifacts.files import read_json
from minitron_mp.artifacts.manifest import Manifest, find_manifest, require_artifact
from minitron_mp.errors import differing_fields
from minitron_mp.report.document import Part


def correction_gain(project: Any, found: dict[str, Any]) -> list[Part]:
    """What the teacher gained by its correction, and lost on other texts; and what the student has of it, where there is one without."""
    told = {"": found, **{f" on {name}": models for name, models in found.get("texts", {}).items()}}
    gained = []
    for where, models in told.items():
        before, after = (models[name]["loss"] for name in ("uncorrected", "teacher"))
        gained.append(
            f"its held-out loss{where} went from {before:.4f} to {after:.4f} ({after / before - 1:+.1%})"
        )
    what = (
        "is distilled from it while it learns, and cut from the original"
        if project.recipe.corrects_during_distillation
        else "is cut and distilled from it"
    )
    parts: list[Part] = [f"The teacher was corrected: {'; '.join(gained)}. The student {what}."]
    if len(told) == 1:
        parts.append(
            "What the teacher has lost on text like that of its own training is not known; name such text in `data.held_out`."
        )
    return [*parts, *_without(project, told)]


def _without(project: Any, told: Mapping[str, Any]) -> list[Part]:
    """The student beside that of a run without correction. told: " on NAME", or nothing -> model -> its quality there."""
    if (folder := project.recipe.correct.baseline) is None:
        advice = "run the recipe without the section `correct` into another output, and name that in `correct.baseline`"
        return [f"What the student would be without it is not known: {advice}."]
    plain = project.without_correction()
    other = read_json(plain.paths["evaluate"], "evaluate")
    if differences := _unlike(plain, project):
        return [
            f"The student of `{folder}` is no measure of the correction, this recipe without it is another one: {'; '.join(differences)}."
        ]
    alike = _texts_alike(plain, project)
    others = {
        "": other,
        **{f" on {name}": models for name, models in other.get("texts", {}).items() if name in alike},
    }
    rows = []
    for where in (where for where in told if where in others):
        without, own = (models[where]["distilled"]["loss"] for models in (others, told))
        rows.append(
            f"its held-out loss{where} is {own:.4f}, without correction {without:.4f} ({own / without - 1:+.1%})"
        )
    parts: list[Part] = [f"Beside the student of `{folder}`, which had no correction: {'; '.join(rows)}."]
    if apart := [where for where in told if where not in others]:
        parts.append(
            f"That student was not judged{' or'.join(apart)}: run `evaluate` there with the same `data.held_out`."
        )
    return parts


def _unlike(plain: Any, project: Any) -> list[str]:
    """How the student in plain's folder differs from the one that plain's recipe asks for, or in its sizes from project's; by stage, causes only."""
    if as_a_whole := _differences(plain, "evaluate", {"texts"}):
        stages = [name for name in [*plain.before("evaluate"), "evaluate"] if name != "texts"]
        return [row for name in stages for row in _differences(plain, name, plain.stages)] or as_a_whole
    theirs, mine = (
        require_artifact(each.paths["plan"], "plan").arch.model_dump() for each in (plain, project)
    )
    return [f"its {row}" for row in differing_fields(theirs, mine)]  # a search may have found other ones


def _differences(plain: Any, name: str, left_out: Collection[str]) -> list[str]:
    """Of a stage's artefact from what the recipe asks for, in what bears on losses. left_out: inputs that do not."""
    found = find_manifest(plain.paths[name])
    if found is None:
        return []
    of_tasks = {"task_items"} if name == "evaluate" else set()

    def core(manifest: Manifest) -> Manifest:
        inputs = {
            key: mark
            for key, mark in manifest.inputs.items()
            if key not in left_out and not key.startswith("task ")
        }
        return manifest.model_copy(
            update={
                "inputs": inputs,
                "settings": {k: v for k, v in manifest.settings.items() if k not in of_tasks},
            }
        )

    return [f"{name} {row}" for row in core(found).differences(core(plain.manifest(name)))]


def _texts_alike(plain: Any, project: Any) -> set[str]:
    """Names in data.held_out under which plain's folder was judged on the same text as project."""
    texts = find_manifest(plain.paths["texts"]) if "texts" in plain.paths else None
    if (
        texts is None
        or require_artifact(plain.paths["evaluate"], "evaluate").inputs.get("texts") != texts.fingerprint
    ):
        return set()
    theirs, mine = (
        set(manifest.inputs["text"].split(", ")) for manifest in (texts, project.manifest("texts"))
    )
    return {row.split()[0] for row in theirs & mine}
