"""Settings and fingerprints that several stages share.

The functions import models and data, so that this module imports quickly.
"""

from __future__ import annotations

from pathlib import Path

from minitron_mp.config.pruning import DEPTH
from minitron_mp.config.recipe import Recipe
from minitron_mp.errors import InputError


def run_settings(recipe: Recipe) -> dict[str, object]:
    """Return the settings that change the result of every stage with a forward pass."""
    return {
        "precision": recipe.precision,
        "seed": recipe.seed,
        "sequence_length": recipe.data.sequence_length,
    }


def fp8_teacher(recipe: Recipe) -> dict[str, object]:
    """Return the FP8 setting of the teacher; empty without FP8."""
    return {"fp8": recipe.teacher.fp8} if recipe.teacher.fp8 else {}


def num_dropped_layers(recipe: Recipe) -> int:
    """Return how many layers are dropped by importance; 0 when the target names them."""
    from minitron_mp.models.hf_config import read_arch
    from minitron_mp.pruning.search_space import layers_to_drop

    target = recipe.target
    keeps_depth = target.num_layers is None and DEPTH not in (target.axes or ())
    if recipe.search is None and (target.drop_layers is not None or keeps_depth):
        return 0
    return layers_to_drop(recipe, read_arch(Path(recipe.model), weights=False))


def drops_layers(recipe: Recipe) -> bool:
    """Return whether layers are dropped by importance.

    True for impossible sizes, which the preflight checks report.
    """
    try:
        return num_dropped_layers(recipe) > 0
    except InputError:
        return True


def model_files(model: str) -> dict[str, str]:
    """Return the fingerprint of a Hugging Face model folder.

    InputError when the folder is not a model.
    """
    from minitron_mp.artifacts.files import fingerprint_files
    from minitron_mp.models.hf_config import read_arch
    from minitron_mp.models.model_folder import model_files as files_of

    folder = Path(model)
    read_arch(folder)
    return {"model": fingerprint_files(files_of(folder))}


def text_settings(recipe: Recipe) -> dict[str, object]:
    """Return the settings of how text is read; empty for the default."""
    is_default = not recipe.data.changed(["text_field"])
    return {} if is_default else {"text_field": recipe.data.text_field}


def text_files(recipe: Recipe, *, held_out: bool) -> dict[str, str]:
    """Return fingerprints of the text, or of data.held_out, and of data.tokenizer."""
    from minitron_mp.artifacts.files import fingerprint_files
    from minitron_mp.data.sources import corpus_fingerprint
    from minitron_mp.models.model_folder import asset_files

    fingerprints = {"text": corpus_fingerprint(recipe.data, held_out, recipe.root)}
    if recipe.data.tokenizer:
        path = Path(recipe.data.tokenizer)
        fingerprints["tokenizer"] = fingerprint_files([path] if path.is_file() else asset_files(path))
    return fingerprints


def task_files(tasks: dict[str, str]) -> dict[str, str]:
    """Return the fingerprint of each task file. tasks: name in the manifest -> path."""
    from minitron_mp.artifacts.files import fingerprint_files

    return {name: fingerprint_files([Path(path)]) for name, path in tasks.items()}
