"""The protocol of a finished project that a report reads. workflow.graph.StageGraph implements it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from minitron_mp.artifacts.curves import Curve
from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.config.recipe import Recipe

Paths = Mapping[str, Path]
"""Stage -> artifact."""


class ProjectStage(Protocol):
    """What a report reads of a stage. workflow.stage.Stage implements it."""

    @property
    def needs_ranks(self) -> bool:
        """Return whether the stage runs on the ranks of a job, not in one process."""

    @property
    def any_ranks(self) -> bool:
        """Return whether any number of ranks can run the stage alone, without the recipe's layout."""

    @property
    def meets_roles(self) -> bool:
        """Return whether the ranks of a remote teacher and of further students take part."""

    @property
    def curves(self) -> Callable[[Recipe], Sequence[Curve]]:
        """Return the function from recipe to the curves of the stage's training runs."""

    @property
    def adds_results(self) -> Callable[[str], bool]:
        """Return the predicate for inputs and settings that add results and change no others."""


class Project(Protocol):
    """A recipe and the artifacts of its stages."""

    recipe: Recipe

    @property
    def paths(self) -> Paths:
        """Return stage -> artifact, in order."""

    @property
    def stages(self) -> Mapping[str, ProjectStage]:
        """Return name -> stage, in order."""

    @property
    def all_stages(self) -> Mapping[str, ProjectStage]:
        """Return stage, or command of an earlier round -> stage, in order."""

    def command(self, name: str) -> str:
        """Return the command that makes an artifact: "plan", or "plan --round narrow"."""

    def manifest(self, name: str) -> Manifest:
        """Return the manifest that the stage's artifact must have."""

    def before(self, name: str) -> list[str]:
        """Return all stages that a stage depends on, in order."""

    def without_correction(self) -> Project:
        """Return the same recipe without its section `correct`, in the folder of correct.baseline."""
