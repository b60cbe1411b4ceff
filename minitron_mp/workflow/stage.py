"""The stages in order: which artefact each needs, which settings change it, and whether it has to run again.

An artefact is the recipe's own when its manifest is the one that the recipe asks for; then its stage is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minitron_mp.config.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """artifact: name below recipe.output. inputs: stages that come before. settings: what of the recipe changes the result."""

    artifact: str
    inputs: tuple[str, ...]
    settings: Callable[[Recipe], dict[str, Any]]
    sources: Callable[[Recipe], dict[str, str]] = lambda recipe: {}
    """Fingerprints of files of the user that the stage reads."""
