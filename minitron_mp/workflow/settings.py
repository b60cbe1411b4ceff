"""Settings and fingerprints that several stages share.

The functions import models and data, so that this module imports quickly.
"""

from __future__ import annotations

import os
from pathlib import Path

from minitron_mp.artifacts.manifest import find_manifest
from minitron_mp.config.pruning import DEPTH
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.workflow.stage import UserFiles

SEARCH_RESULT = "search.json"
"""The artifact of the stage search."""

IMPORTED_MODELS = {"import": "teacher", "import-teacher": "distilling_teacher"}
"""Stage -> its artifact, a model in Megatron-Core's form."""


def run_settings(recipe: Recipe) -> dict[str, object]:
    """Return the settings that change the result of every stage with a forward pass."""
    return {
        "precision": recipe.precision,
        "seed": recipe.seed,
        "sequence_length": recipe.data.sequence_length,
        **({"document_mask": True} if recipe.data.document_mask else {}),
    }


def loss_settings(recipe: Recipe) -> dict[str, object]:
    """Return the settings of the loss mask; empty for the default."""
    return {"eod_mask_loss": True} if recipe.data.eod_mask_loss else {}


def blend_settings(recipe: Recipe, *parts: str) -> dict[str, object]:
    """Return the shares of the texts of these parts; empty for parts that are not blends.

    The stage data does not depend on them. Epochs and tokens are shares of the samples of distill.
    """
    settings: dict[str, object] = {}
    for part in parts:
        shares = recipe.data.shares(part)
        if shares is None:
            continue
        settings[f"{part} shares"] = list(getattr(recipe.data, part).values())
        if any(share.unit != "weight" for share in shares):
            settings["samples of distill"] = recipe.distill.num_samples
    return settings


def text_parts(settings: TrainingConfig) -> list[str]:
    """Return the parts of the text that change the result of a training run.

    With patience the validations decide its last step.
    """
    return ["train"] if settings.patience is None else ["train", "valid"]


def fp8_teacher(recipe: Recipe) -> dict[str, object]:
    """Return the FP8 setting of the teacher; empty without FP8."""
    return {"fp8": recipe.teacher.fp8} if recipe.teacher.fp8 else {}


def base_arch(recipe: Recipe) -> Arch:
    """Return the architecture of the model that is pruned.

    It is read from the artifact of the stage import if the model folder has been deleted since. In a
    further round it is the student of the round before.
    """
    from minitron_mp.models.hf_config import read_arch

    if recipe.previous is not None:
        return student_arch(recipe.previous)
    folder = Path(recipe.model)
    if not (folder / "config.json").is_file():
        manifest = find_manifest(recipe.run.root / IMPORTED_MODELS["import"])
        if manifest and manifest.arch and manifest.sources.get("model") == [os.path.abspath(folder)]:
            return manifest.arch
    return read_arch(folder, weights=False)


def student_arch(recipe: Recipe) -> Arch:
    """Return the architecture of the student of a round.

    Before a search has finished it is that of the largest candidate.
    """
    from minitron_mp.pruning.candidates import chosen
    from minitron_mp.pruning.search_space import possible_students

    found = recipe.root / SEARCH_RESULT
    if recipe.search is not None and find_manifest(found) is not None:
        return chosen(found)
    return max(possible_students(recipe, base_arch(recipe)), key=lambda arch: arch.num_parameters())


def num_dropped_layers(recipe: Recipe) -> int:
    """Return how many layers are dropped by importance; 0 when the target names them."""
    from minitron_mp.pruning.search_space import layers_to_drop

    target = recipe.target
    keeps_depth = target.num_layers is None and DEPTH not in (target.axes or ())
    if recipe.search is None and (target.drop_layers is not None or keeps_depth):
        return 0
    return layers_to_drop(recipe, base_arch(recipe))


def drops_layers(recipe: Recipe) -> bool:
    """Return whether layers are dropped by importance.

    True for impossible sizes, which the preflight checks report.
    """
    try:
        return num_dropped_layers(recipe) > 0
    except InputError:
        return True


def model_files(model: str) -> dict[str, UserFiles]:
    """Return a Hugging Face model folder. Its fingerprint raises InputError if it is not a model."""
    from minitron_mp.artifacts.files import fingerprint_files
    from minitron_mp.models.hf_config import read_arch
    from minitron_mp.models.model_folder import INDEX, SINGLE_FILE
    from minitron_mp.models.model_folder import model_files as files_of

    folder = Path(model)

    def fingerprint() -> str:
        read_arch(folder)
        return fingerprint_files(files_of(folder))

    def missing() -> list[str]:
        has_weights = any((folder / name).is_file() for name in (SINGLE_FILE, INDEX))
        return [] if (folder / "config.json").is_file() and has_weights else [model]

    return {"model": UserFiles(paths=[model], fingerprint=fingerprint, missing=missing)}


def text_settings(recipe: Recipe) -> dict[str, object]:
    """Return the settings of how text is read; empty for the default."""
    return {name: getattr(recipe.data, name) for name in recipe.data.changed(["text_field", "chat_field"])}


def text_files(recipe: Recipe, *, held_out: bool) -> dict[str, UserFiles]:
    """Return the files of the text, or of data.held_out, and of data.tokenizer."""
    from minitron_mp.data.sources import corpus_fingerprint

    paths = [path for entries in text_entries(recipe, held_out) for path in entries]
    files = {
        "text": UserFiles(
            paths=paths,
            fingerprint=lambda: corpus_fingerprint(recipe.data, held_out, recipe.run.root),
            missing=lambda: [path for path in paths if not _text_exists(path)],
        )
    }
    if recipe.data.tokenizer:
        files["tokenizer"] = _tokenizer_files(recipe.data.tokenizer)
    if recipe.data.chat_template:
        files |= task_files({"chat template": recipe.data.chat_template})
    return files


def _tokenizer_files(tokenizer: str) -> UserFiles:
    """Return data.tokenizer. The artifact of the stage data has a copy for later stages."""
    from minitron_mp.artifacts.files import fingerprint_files
    from minitron_mp.models.model_folder import asset_files

    path = Path(tokenizer)

    def fingerprint() -> str:
        if not path.exists():
            raise InputError(
                f"data.tokenizer: {tokenizer} does not exist; give a Hugging Face folder or a sentencepiece "
                ".model file"
            )
        return fingerprint_files([path] if path.is_file() else asset_files(path))

    return UserFiles(
        paths=[tokenizer], fingerprint=fingerprint, missing=lambda: [] if path.exists() else [tokenizer]
    )


def text_entries(recipe: Recipe, held_out: bool) -> list[list[str]]:
    """Return the paths of each part of the text, or of each text of data.held_out.

    The standard library has none.
    """
    from minitron_mp.data.sources import STDLIB

    data = recipe.data
    if held_out:
        return list(data.held_out.values())
    if data.train:
        return [list(data.calibration), list(data.train), list(data.valid)]
    source = [data.source] if isinstance(data.source, str) else data.source
    return [] if source == [STDLIB] else [source]


def _text_exists(entry: str) -> bool:
    """Return whether a file, a folder that is not empty, or Megatron data exists."""
    path = Path(entry)
    if path.is_dir() and any(path.iterdir()):
        return True
    prefix = entry.removesuffix(".bin").removesuffix(".idx")
    return path.is_file() or (Path(prefix + ".bin").is_file() and Path(prefix + ".idx").is_file())


def task_files(tasks: dict[str, str]) -> dict[str, UserFiles]:
    """Return task files. tasks: name in the manifest -> path."""
    return {name: _task_file(path) for name, path in tasks.items()}


def _task_file(path: str) -> UserFiles:
    from minitron_mp.artifacts.files import fingerprint_files

    return UserFiles(
        paths=[path],
        fingerprint=lambda: fingerprint_files([Path(path)]),
        missing=lambda: [] if Path(path).is_file() else [path],
    )
