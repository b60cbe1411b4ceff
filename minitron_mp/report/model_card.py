"""The model card of the exported student: README.md with the front matter of the Hugging Face Hub.

The card depends only on the artifacts.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from minitron_mp import __version__
from minitron_mp.artifacts.files import CARD, read_json, write_text
from minitron_mp.artifacts.manifest import Change, Manifest, find_manifest, require_artifact, write_manifest
from minitron_mp.artifacts.written_files import checksum
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.console import say
from minitron_mp.data.positions import sample_positions
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.models.families.export import reader_rows
from minitron_mp.pruning.plan import PrunePlan, size_rows
from minitron_mp.report.document import Code, Document, Part, Section, Table, markdown
from minitron_mp.report.project import Paths, Project
from minitron_mp.report.rounds import rounds_up_to
from minitron_mp.report.tables import (
    TASKS_NOTE,
    UNITS_NOTE,
    changes_note,
    harness_table,
    load_evaluation,
    quality_table,
    tasks_table,
)

SOURCE_KEYS = ("license", "license_name", "license_link", "language")
"""Front matter that the student's card has from the card of the original."""

TAGS = ["minitron", "pruning", "knowledge-distillation"]

USAGE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))
"""


def model_card(recipe: Recipe, paths: Paths, manifest: Manifest, family: str, assets: Path) -> str:
    """Return the text of the card.

    manifest: of the export. family: of the exported model. assets: folder with tokenizer and other
    small files of the model that was pruned. Held-out numbers are included if evaluation.json is
    about this student. InputError if an artifact is damaged.
    """
    rounds = rounds_up_to(recipe, paths)
    plans = {each: PrunePlan.load(each.paths["plan"]) for each in rounds if each.recipe.prunes}
    teacher, student = next(iter(plans.values())).teacher, list(plans.values())[-1].student
    num_parameters, num_teacher_parameters = student.num_parameters(), teacher.num_parameters()
    base = _hub_name(recipe.model, assets)
    name = base or Path(recipe.model).name
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        **source_card(assets),
    )
    method: list[Part] = []
    for each in rounds:
        if len(rounds) > 1:
            method.append(f"Round {each.recipe.round_name}:")
        training = _training(each.recipe, each.paths, manifest if each is rounds[-1] else None)
        method += _method(each.recipe, plans.get(each), name, training)
    method.append(f"Software: minitron-mp {__version__}. Method: arXiv 2407.14679, arXiv 2408.11796.")
    sections = [
        Section("Sizes", [Table(("size", "before", "this model", "kept"), size_rows(teacher, student))]),
        Section("How it was made", method),
        *_evaluation_sections(recipe, paths, manifest),
        Section(
            "Usage",
            ["In the folder of this file:", Code(USAGE.strip()), *_readers(student, family)],
        ),
        Section("Limitations", _limitations(recipe, family, assets)),
    ]
    lead = (
        f"A language model with {num_parameters:,} parameters, pruned from {name} "
        f"({num_teacher_parameters:,} parameters) and distilled with the Minitron method."
    )
    title = f"{name}, {num_parameters / num_teacher_parameters:.1%} of its parameters"
    document = Document(title, lead, sections)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{markdown(document)}"))


@dataclass(frozen=True)
class _Training:
    """The distillation of a model. settings: its last ones. steps: up to a saved step or early stop."""

    settings: DistillConfig
    steps: int
    changes: Sequence[Change]


def _training(recipe: Recipe, paths: Paths, manifest: Manifest | None) -> _Training:
    """Return the distillation of a model. manifest: of its export; None for an earlier round."""
    distilled = require_artifact(paths["distill"], recipe.command("distill"))
    steps = recipe.distill.steps
    if manifest is not None and "step" in manifest.settings:
        steps = int(manifest.settings["step"])
    elif distilled.validation is not None:
        steps = distilled.validation.step
    # The recipe of a saved step may have later settings.
    trained = {name: distilled.settings[name] for name in ("lr", "min_lr", "global_batch_size")}
    return _Training(recipe.distill.model_copy(update=trained), steps, distilled.changes)


def _readers(student: Arch, family: str) -> list[Part]:
    """Return the table of programs that read the model."""
    rows = reader_rows(student.model_copy(update={"family": family}))
    if not rows:
        return []
    cells = [(reader, "yes" if not reason else f"no: {reason}") for reader, reason in rows]
    return ["Programs that read this folder:", Table(("program", "works"), cells)]


def refresh_model_card(project: Project) -> None:
    """Rewrite the card of a finished export if its evaluation has changed; for one process.

    A card that the user edited is kept.
    """
    paths = project.paths
    manifest = find_manifest(paths["export"])
    if manifest is None or manifest.arch is None:
        return
    if manifest.fingerprint != project.manifest("export").fingerprint:
        return
    assets = paths["import"] / "assets"
    text = model_card(project.recipe, paths, manifest, manifest.arch.family, assets)
    card = paths["export"] / CARD
    current, new = card.read_bytes() if card.is_file() else None, text.encode()
    recorded = manifest.files.get(CARD)
    if recorded and current is not None and current != new and checksum(current) != recorded:
        say(f"{card} was edited, so the new evaluation is not written to it; delete it for a new card")
        return
    if current != new:
        write_text(card, text)
    if recorded and recorded != checksum(new):
        files = {**manifest.files, CARD: checksum(new)}
        write_manifest(paths["export"], manifest.model_copy(update={"files": files}))


def source_card(folder: Path) -> dict[str, Any]:
    """Return license and language from the model card in a folder; {} if it cannot be read."""
    try:
        return _front_matter(folder / CARD)
    except InputError:
        return {}


def source_card_problem(folder: Path) -> str:
    """Return why license and language cannot be read from the model card in a folder, or ""."""
    try:
        _front_matter(folder / CARD)
    except InputError as error:
        return str(error)
    return ""


def _front_matter(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes() if path.is_file() else b""
        text = _decoded(content).replace("\r\n", "\n")
        if not text.startswith("---"):
            return {}
        fields = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # huggingface_hub raises many types for invalid front matter
        reason = " ".join(str(error).split())
        raise InputError(
            f"the front matter of {path} cannot be read ({reason}), so the student's card has no license and "
            "no language; correct that file and repeat the import, or add them to the student's README.md"
        ) from error
    return {key: fields[key] for key in SOURCE_KEYS if fields.get(key)}


def _decoded(content: bytes) -> str:
    """Return the text of a card in UTF-8, in UTF-16 with a mark, or in a code page of Windows."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _hub_name(model: str, assets: Path) -> str | None:
    """Return owner/name on the Hub, or None if it is unknown.

    The name comes from the folder of the Hub's cache, or from config.json.
    """
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", str(Path(model).absolute()))
    if cached:
        return "/".join(cached.groups())
    # transformers 4 wrote the name into config.json.
    name = read_json(assets / "config.json", "import --force").get("_name_or_path") or ""
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).exists()
    return name if is_hub_name else None


def _method(recipe: Recipe, plan: PrunePlan | None, name: str, training: _Training) -> list[Part]:
    """Return paragraphs on one round. plan: None if it does not prune."""
    parts: list[Part] = []
    if recipe.search:
        parts.append("The sizes were chosen by an architecture search.")
    if plan is not None:
        parts.append(_pruning_text(recipe, plan))
    return [*parts, _distillation_text(recipe, name, training), *changes_note(training.changes)]


def _pruning_text(recipe: Recipe, plan: PrunePlan) -> str:
    dropped = plan.dropped
    if not dropped:
        layers = "none"
    elif recipe.target.drop_layers is not None:
        layers = f"{', '.join(map(str, dropped))}; listed in the recipe"
    else:
        metric = f" ({recipe.depth.metric})" if recipe.depth.method != "cosine" else ""
        layers = f"{', '.join(map(str, dropped))}; chosen by `{recipe.depth.method}`{metric}"
    text = (
        "Pruning: on each axis the units with the highest activation-based importance were kept, measured on "
        f"{recipe.score.num_samples:,} samples of {recipe.data.sequence_length:,} tokens. "
        f"Layers dropped (counted from 0): {layers}."
    )
    if plan.merge:
        text += " The residuals of pruned heads were added to the queries of kept heads."
    return text


def _distillation_text(recipe: Recipe, name: str, training: _Training) -> str:
    d = training.settings
    length = recipe.data.sequence_length
    is_stdlib = recipe.data.source == "python-stdlib" and not recipe.data.train
    text = "the Python standard library" if is_stdlib else "the text of the recipe"
    teacher = Path(recipe.teacher.model).name if recipe.teacher.model else name
    if recipe.correct:
        when = "during distillation" if recipe.corrects_during_distillation else "before"
        teacher += (
            f", which was trained for {recipe.correct.steps:,} steps on the same text {when} "
            "(teacher correction)"
        )
    losses = []
    if d.kl_weight:
        parameters = "".join(
            f" ({name} {value:g})" for name, value in (d.divergence_parameters or {}).items()
        )
        losses.append(f"{d.kl_weight:g} x {d.divergence}{parameters}")
    if d.ce_weight:
        losses.append(f"{d.ce_weight:g} x cross-entropy")
    if d.states:
        losses.append(f"{d.states.kind} of {len(d.states.layers)} hidden states")
    positions = sample_positions(d, training.changes)
    batch_sizes = ", then ".join(f"{size:,}" for _, size in positions.sizes)
    tokens = positions.num_trained(training.steps) * length
    return (
        f"Distillation: {training.steps:,} steps of {batch_sizes} samples of {length:,} tokens, "
        f"{tokens:,} tokens of {text}; teacher: {teacher}. Loss: {' + '.join(losses)}, temperature "
        f"{d.temperature:g}. Learning rate: {d.lr:g} to {d.min_lr:g}."
    )


def _evaluation_sections(recipe: Recipe, paths: Paths, manifest: Manifest) -> list[Section]:
    """Return the section with held-out numbers and task scores; [] if this student was not evaluated."""
    evaluated = find_manifest(paths["evaluate"])
    if evaluated is None or evaluated.inputs.get("distill") != manifest.inputs["distill"]:
        return []
    evaluation = load_evaluation(paths)
    num_tokens = evaluation["distilled"]["num_tokens"]
    parts: list[Part] = [
        f"Measured on {num_tokens:,} held-out tokens. {UNITS_NOTE} This model is `distilled`.",
        quality_table(recipe, paths, speed=False),
    ]
    for title, results in (
        (TASKS_NOTE, tasks_table(evaluation)),
        ("Tasks of lm-evaluation-harness:", harness_table(recipe.root, paths)),
    ):
        if results is not None:
            parts += [title, results]
    return [Section("Evaluation", parts)]


def _limitations(recipe: Recipe, family: str, assets: Path) -> list[Part]:
    licences = sorted(path.name for pattern in ("LICENSE*", "NOTICE*") for path in assets.glob(pattern))
    parts: list[Part] = [
        "The usage restrictions of the original model apply to this model. It has the biases of the "
        "original, and pruning adds further errors.",
        f"It was distilled on sequences of {recipe.data.sequence_length:,} tokens. It had no alignment or "
        "safety training after that.",
    ]
    if family != read_json(assets / "config.json", "import --force")["model_type"]:
        parts.append(f"It is saved as `{family}`, which computes the same function as the original's family.")
    if licences:
        parts.append(f"Licence of the original model: {', '.join(f'`{name}`' for name in licences)}.")
    return parts
