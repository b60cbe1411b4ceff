"""The model card of the exported student: README.md with the front matter of the Hugging Face Hub. The same artefacts give the same card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from minitron_mp import __version__
from minitron_mp.artifacts.files import read_json, write_text
from minitron_mp.artifacts.manifest import Manifest, find_manifest
from minitron_mp.config.recipe import Recipe
from minitron_mp.errors import InputError
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.report.document import Code, Document, Part, Section, Table, markdown
from minitron_mp.report.tables import evaluation, harness_table, quality_table, tasks_table

CARD = "README.md"

TAGS = ["minitron", "pruning", "knowledge-distillation"]


def model_card(
    recipe: Recipe, paths: Mapping[str, Path], manifest: Manifest, family: str, assets: Path
) -> str:
    """The card as text. manifest: of the export; family: of the exported model; assets: side files of the model that was cut.

    Numbers on held-out text are there when evaluation.json is of this very student. InputError for a damaged one.
    """
    plan, source = PrunePlan.load(paths["plan"]), source_card(assets)
    student, base = plan.student.num_parameters(), _hub_name(recipe.model, assets)
    name = base or Path(recipe.model).name
    data = ModelCardData(
        base_model=base, library_name="transformers", pipeline_tag="text-generation", tags=TAGS, **source
    )
    sections = [
        Section("Sizes", [Table(("size", "before", "this model", "kept"), plan.summary())]),
        Section("How it was made", _made(recipe, plan, name)),
        *_evaluated(recipe, paths, manifest),
        Section("Use", ["In the folder of this file:", Code(USE.strip()), "vLLM loads the folder as well."]),
        Section("Limits", _limits(recipe, family, assets)),
    ]
    lead = f"A language model of {student:,} parameters, cut from {name} ({plan.teacher.num_parameters():,} parameters) and distilled by the Minitron method."
    document = Document(
        f"{name}, {student / plan.teacher.num_parameters():.1%} of its parameters", lead, sections
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{markdown(document)}"))


def refresh_model_card(project: Any) -> None:
    """Write the card of a finished export again where its evaluation has changed; one process."""
    paths, found = project.paths, find_manifest(project.paths["export"])
    if found is None or found.arch is None or found.fingerprint != project.manifest("export").fingerprint:
        return
    text, place = (
        model_card(project.recipe, paths, found, found.arch.family, paths["import"] / "assets"),
        paths["export"] / CARD,
    )
    if not place.is_file() or place.read_text(encoding="utf-8") != text:
        write_text(place, text)


USE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))
"""


def source_card(folder: Path) -> dict[str, Any]:
    """License and language, where the card of the model in the folder says them; InputError when its front matter is none."""
    text = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    if not text.startswith("---"):
        return {}
    try:
        given = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, YAMLError) as error:
        raise InputError(
            f"the front matter of {folder / CARD} cannot be read: {error}; mend it, or move the file away"
        ) from error
    return {
        key: given[key] for key in ("license", "license_name", "license_link", "language") if given.get(key)
    }


def _hub_name(model: str, assets: Path) -> str | None:
    """owner/name on the Hub, where the folder or its config.json tells: a snapshot in the Hub's cache, or what transformers 4 noted."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", str(Path(model).absolute()))
    if cached:
        return "/".join(cached.groups())
    noted = read_json(assets / "config.json", "import --force").get("_name_or_path") or ""
    return noted if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", noted) and not Path(noted).exists() else None


def _made(recipe: Recipe, plan: PrunePlan, name: str) -> list[Part]:
    d, length = recipe.distill, recipe.data.sequence_length
    text = (
        "the Python standard library"
        if recipe.data.source == "python-stdlib" and not recipe.data.train
        else "the text of the recipe"
    )
    tutor = f"{Path(recipe.teacher.model).name}" if recipe.teacher.model else name
    when = "meanwhile" if recipe.corrects_meanwhile else "before"
    corrected = (
        f", which was trained for {recipe.correct.steps:,} steps on the same text {when} (teacher correction)"
        if recipe.correct
        else ""
    )
    losses = [
        f"{weight:g} x {what}"
        for weight, what in ((d.kl_weight, d.divergence), (d.ce_weight, "cross-entropy"))
        if weight
    ]
    by = recipe.depth.method + "`" + f" ({recipe.depth.metric})" * (recipe.depth.method != "cosine")
    chosen = "named in the recipe" if recipe.target.drop_layers is not None else f"chosen by `{by}"
    if d.states:
        losses.append(f"{d.states.kind} of {len(d.states.layers)} hidden states")
    parts: list[Part] = [
        *(["The sizes were found by a search."] if recipe.search else []),
        f"Pruned to these sizes: what stays of each axis scored highest by its activations on {recipe.score.num_samples:,} samples of {length:,} tokens. "
        f"Layers dropped (from 0): {', '.join(map(str, plan.dropped)) + f'; {chosen}' if plan.dropped else 'none'}."
        + " The queries of heads that stay have the residual of pruned ones."
        * bool(plan.merge),
        f"Distilled: {d.steps:,} steps of {d.global_batch_size:,} samples of {length:,} tokens, {d.steps * d.global_batch_size * length:,} tokens of {text}, "
        f"from {tutor}{corrected}. Loss: {' + '.join(losses)}, temperature {d.temperature:g}; learning rate {d.lr:g} to {d.min_lr:g}.",
        f"Software: minitron-mp {__version__}. Method: arXiv 2407.14679, arXiv 2408.11796.",
    ]
    return parts


def _evaluated(recipe: Recipe, paths: Mapping[str, Path], manifest: Manifest) -> list[Section]:
    """Held-out numbers and task scores of this student; none when nothing, or another student, was evaluated."""
    found = find_manifest(paths["evaluate"])
    if found is None or found.inputs.get("distill") != manifest.inputs["distill"]:
        return []
    content = evaluation(paths)
    quality, tasks = quality_table(recipe, paths, speed=False), tasks_table(content)
    said = f"On {content['distilled']['num_tokens']:,} held-out tokens. Losses and KL(teacher || model) are means in nats a token."
    parts: list[Part] = [f"{said} This model is `distilled`.", quality]
    if tasks is not None:
        parts += ["Shares of the items, zero-shot, with standard errors.", tasks]
    if (harness := harness_table(recipe.root, paths)) is not None:
        parts += ["Tasks of lm-evaluation-harness.", harness]
    return [Section("Evaluation", parts)]


def _limits(recipe: Recipe, family: str, assets: Path) -> list[Part]:
    licences = sorted(path.name for pattern in ("LICENSE*", "NOTICE*") for path in assets.glob(pattern))
    parts: list[Part] = [
        "What the original model must not be used for, this one must not either; it has its biases, and errors of its own from pruning.",
        f"It has seen sequences of {recipe.data.sequence_length:,} tokens in distillation, and no alignment or safety training after it.",
    ]
    if family != read_json(assets / "config.json", "import --force")["model_type"]:
        parts.append(f"It is written as `{family}`, which computes the same as the original's family.")
    if licences:
        parts.append(f"Licence of the original model: {', '.join(f'`{name}`' for name in licences)}.")
    return parts
