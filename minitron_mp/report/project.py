"""The protocol of a finished project that a report reads. workflow.graph.StageGraph implements it."""

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
        """Return stage -> artifact, in order."""

    @property
    def stages(self) -> Collection[str]:
        """Return the names of the stages, in order."""

    def manifest(self, name: str) -> Manifest:
        """Return the manifest that the stage's artifact must have."""

    def before(self, name: str) -> list[str]:
        """Return all stages that a stage depends on, in order."""

    def without_correction(self) -> Project:
        """Return the same recipe without its section `correct`, in the folder of correct.baseline."""
