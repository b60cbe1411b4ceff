"""A mistake of a user, and the changes of a small project that make one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Change = Callable[[Path], object]
"""Changes the project in a folder: recipe.yaml, model/, text/."""


@dataclass(frozen=True)
class Mistake:
    """words: arguments of the command after the recipe. change: damage of the project.

    command: stage, or another command. recipe: its argument. dry_run: add --dry-run.
    """

    title: str
    words: tuple[str, ...] = ()
    change: Change = lambda project: None
    command: str = "compress"
    recipe: str = "recipe.yaml"
    dry_run: bool = True

    def arguments(self) -> list[str]:
        return [self.command, self.recipe, *self.words, *(["--dry-run"] if self.dry_run else [])]


def overrides(title: str, *words: str) -> Mistake:
    return Mistake(title, words)


def write(path: str, content: str | bytes) -> Change:
    def change(project: Path) -> None:
        target = project / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def edit_json(path: str, **values: Any) -> Change:
    """Set keys of a JSON file; a value None removes its key."""

    def change(project: Path) -> None:
        content = json.loads((project / path).read_text())
        content |= values
        kept = {key: value for key, value in content.items() if value is not None}
        (project / path).write_text(json.dumps(kept))

    return change


def write_null(path: str, key: str) -> Change:
    """Set a key of a JSON file to null."""

    def change(project: Path) -> None:
        content = json.loads((project / path).read_text())
        (project / path).write_text(json.dumps({**content, key: None}))

    return change


def edit_recipe(**sections: Any) -> Change:
    def change(project: Path) -> None:
        recipe = yaml.safe_load((project / "recipe.yaml").read_text())
        (project / "recipe.yaml").write_text(yaml.safe_dump(recipe | sections))

    return change


def edit_weights(edit: Callable[[dict[str, Any]], object]) -> Change:
    """edit: changes the dictionary of tensors."""

    def change(project: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = project / "model" / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def remove(path: str) -> Change:
    return lambda project: (project / path).unlink()


def truncate(path: str, size: int) -> Change:
    return lambda project: os.truncate(project / path, size)


def in_order(*changes: Change) -> Change:
    return lambda project: [change(project) for change in changes]


def move_into(path: str) -> Change:
    """Move the model into another folder."""
    return lambda project: (
        (project / path).parent.mkdir(parents=True) or (project / "model").rename(project / path)
    )


def copy_recipe(path: str) -> Change:
    return lambda project: write(path, (project / "recipe.yaml").read_text())(project)


def evaluated_student(project: Path) -> None:
    """Make an old exported student, in whose folder the user has evaluated it."""
    from minitron_mp.artifacts.manifest import Manifest, writing_artifact

    folder = project / "out" / "student_hf"
    with writing_artifact(folder, Manifest(stage="export", settings={}, inputs={})) as temporary:
        (temporary / "README.md").write_text("# The card")
    (folder / "README.md").write_text("# My card")
    (folder / "results.json").write_text("{}")
