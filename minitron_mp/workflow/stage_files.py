"""The artifacts of one stage: paths and manifests of its inputs, and the path of its output.

This module needs neither torch nor ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_mp.artifacts.files import ASSETS
from minitron_mp.artifacts.manifest import Manifest, require_artifact
from minitron_mp.config.recipe import Recipe
from minitron_mp.models.arch import Arch

if TYPE_CHECKING:
    from minitron_mp.data.tokenizer import Tokenizer

TOKENIZER = "tokenizer"
"""Folder in the artifact of the stage data with a copy of data.tokenizer."""


class StopRequested(Exception):
    """Raised by a stage on one rank that stops early. The text is the reason."""


@dataclass(frozen=True)
class StageFiles:
    """A recipe, the paths of its artifacts, and the manifest of the artifact of one stage."""

    recipe: Recipe
    paths: dict[str, Path]
    manifest: Manifest
    input_manifests: dict[str, Manifest] = field(default_factory=dict, repr=False)
    """Cache of the manifests that were read; each is read once."""
    stop_request: Callable[[], str] = field(default=lambda: "", repr=False)
    """Returns the reason to stop early, or "" to continue."""

    @property
    def output(self) -> Path:
        """Return the path of the artifact that the stage writes."""
        return self.paths[self.manifest.stage]

    def manifest_of(self, stage: str) -> Manifest:
        """Return the manifest of another stage's artifact; InputError when it is missing."""
        if stage not in self.input_manifests:
            self.input_manifests[stage] = require_artifact(self.paths[stage], self.recipe.command(stage))
        return self.input_manifests[stage]

    def arch(self, stage: str) -> Arch:
        """Return the architecture of the model in another stage's artifact."""
        arch = self.manifest_of(stage).arch
        assert arch is not None, f"{self.paths[stage]} has no model"
        return arch

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of data.tokenizer, or the model's."""
        from minitron_mp.data.tokenizer import for_model, load_tokenizer

        tokenizer = load_tokenizer(tokenizer_path(self.recipe, self.paths))
        return for_model(tokenizer, self.arch("import").vocab_size)


def tokenizer_path(recipe: Recipe, paths: Mapping[str, Path]) -> Path:
    """Return the tokenizer of a recipe: data.tokenizer, or the model's.

    If data.tokenizer was deleted, its copy in the artifact of the stage data is used. paths: stage ->
    artifact.
    """
    if recipe.data.tokenizer is None:
        return paths["import"] / ASSETS
    path, copy = Path(recipe.data.tokenizer), paths["data"] / TOKENIZER
    if path.exists() or not copy.is_dir():
        return path
    return copy / path.name if (copy / path.name).is_file() else copy


def checkpoint_folder(recipe: Recipe, stage: str) -> Path:
    """Return the folder of a stage's checkpoints; deleted when its artifact is written."""
    return recipe.root / "checkpoints" / stage
