"""What a report needs of a finished project; workflow.graph.StageGraph is one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.config.recipe import Recipe

Paths = Mapping[str, Path]
"""Stage -> artifact."""


class Project(Protocol):
    """A recipe and the artifacts of its stages."""

    recipe: Recipe

    @property
    def paths(self) -> Paths:
        """Stage -> artifact, in order."""

    @property
    def stages(self) -> Collection[str]:
        """Names of the stages, in order."""

    def manifest(self, name: str) -> Manifest:
        """The manifest that the stage's artifact must have."""

    def before(self, name: str) -> list[str]:
        """All stages that a stage builds on, in order."""

    def without_correction(self) -> Project:
        """The same recipe without its section `correct`, in the folder of correct.baseline."""
