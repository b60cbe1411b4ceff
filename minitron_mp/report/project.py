"""What a report needs of a finished project; workflow.graph.StageGraph is one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.config.recipe import Recipe

Paths = Mapping[str, Path]
"""Stage -> artefact."""


class Project(Protocol):
    """A recipe and the artefacts of its stages."""

    recipe: Recipe

    @property
    def paths(self) -> Paths:
        """Stage -> artefact, in order."""

    @property
    def stages(self) -> Collection[str]:
        """Names of the stages, in order."""

    def manifest(self, name: str) -> Manifest:
        """The manifest that the stage's artefact must have."""

    def before(self, name: str) -> list[str]:
        """All stages that a stage builds on, in order."""

    def without_correction(self) -> Project:
        """The same recipe without its section `correct`, in the folder of correct.baseline."""
