"""The description of a stage: its artifact, its inputs, its settings and its work.

Each stage has one module in stages/. The module imports only the recipe at the top, and other
modules inside its functions, so that listing the stages does not import torch. The work of a long
stage is in a second file of the same folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from minitron_mp.artifacts.curves import Curve
from minitron_mp.config.recipe import Recipe

if TYPE_CHECKING:
    from minitron_mp.data.shards import Share
    from minitron_mp.workflow.context import StageContext
    from minitron_mp.workflow.disk_sizes import DiskSizes
    from minitron_mp.workflow.stage_files import StageFiles

Input = str | Callable[[Recipe], str]
"""The name of a stage, or a function of the recipe that returns it."""


@dataclass(frozen=True, kw_only=True)
class UserFiles:
    """Files of the user that a stage reads."""

    paths: list[str]
    """Paths in the recipe."""
    fingerprint: Callable[[], str]
    """Returns a hash of the files. InputError if they cannot be used."""
    missing: Callable[[], list[str]]
    """Returns the paths at which there is nothing any more. It reads no file."""

    @property
    def absolute_paths(self) -> list[str]:
        """The paths from the root of the file system, links not resolved."""
        return [os.path.abspath(path) for path in self.paths]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the workflow. It reads the artifacts of other stages and writes one."""

    name: str
    """Name of the stage and of the command that runs it."""
    help: str
    artifact: str
    """File or folder below recipe.output."""
    inputs: tuple[Input, ...] = ()
    """Stages whose artifacts this stage reads."""
    optional_inputs: tuple[str, ...] = ()
    """Stages whose artifacts this stage reads if the recipe has them."""
    reads_earlier_students: bool = False
    """Whether this stage reads the students of all earlier rounds."""
    unrecorded_inputs: tuple[str, ...] = ()
    """Optional inputs that do not change the result, such as a cache. They must be up to date, but
    they are not in the manifest."""
    settings: Callable[[Recipe], dict[str, object]] = lambda recipe: {}
    """The settings that change the result. A change of any other setting does not rerun the stage.
    """
    sources: Callable[[Recipe], dict[str, UserFiles]] = lambda recipe: {}
    """The user's files that the stage reads, by their name in the manifest. Later stages do not read
    them, so they may be deleted when the stage is done."""
    when: Callable[[Recipe], bool] = lambda recipe: True
    """Whether a recipe has this stage."""
    shared: Literal["", "always", "if equal"] = ""
    """Whether a further round uses the artifact of an earlier round: always, or if the round's own one
    would be equal."""
    in_last_round: bool = False
    """Whether `compress` runs the stage only in the last round."""
    requirement: str = ""
    """The part of a recipe that adds this stage, for error messages. Empty for a stage of every
    recipe."""
    run: Callable[[StageContext], None] | None = None
    """Writes the artifact; called on all ranks of the world. None for a stage with run_on_one_rank.
    """
    run_on_one_rank: Callable[[StageFiles], None] | None = None
    """Writes the artifact in one process, without process groups. None for a stage with run."""
    run_share: Callable[[StageFiles, Share], None] | None = None
    """Does a share of the work in one process, for --shard. The manifest has no user's files but the
    tokenizer, because their fingerprints take long. None if the work is not divided."""
    any_ranks: bool = False
    """Whether a stage with run builds no model, so any number of ranks can run it alone, without the
    recipe's layout."""
    problems: Callable[[StageFiles], list[str]] | None = None
    """Returns why a later stage would fail with the finished artifact, as sentences. Called by
    compress, which reports the problems of consecutive stages together."""
    meets_roles: bool = False
    """Whether the ranks of a remote teacher and of further students take part."""
    curves: Callable[[Recipe], Sequence[Curve]] = lambda recipe: ()
    """Curves of the training runs of the stage. The curve of the stage's model is the last one."""
    disk_bytes: Callable[[DiskSizes], float] = lambda sizes: 0.0
    """Estimated bytes of the artifact and of the checkpoints, for a stage that writes a model."""
    adds_results: Callable[[str], bool] = lambda name: False
    """Whether an input or setting of the manifest adds results without changing the others."""
    has_checkpoints: bool = False
    """Whether the stage saves checkpoints below recipe.output while it runs."""
    reads_saved_steps: bool = False
    """Whether the command has --step, for the model of a saved step of distill."""
    progress: str = ""
    """File with a manifest below recipe.output in which the stage saves other progress; "" for none.
    """

    def __post_init__(self) -> None:
        assert (self.run is None) != (self.run_on_one_rank is None), self.name

    @property
    def needs_ranks(self) -> bool:
        return self.run is not None


def pruning_base(recipe: Recipe) -> str:
    """Return the stage whose model is scored and pruned."""
    return recipe.pruning_base


def initial_student(recipe: Recipe) -> str:
    """Return the stage whose model is trained by distillation."""
    return recipe.initial_student


def prunes(recipe: Recipe) -> bool:
    """Return whether a round prunes a model."""
    return recipe.prunes


def distillation_teacher(recipe: Recipe) -> str:
    """Return the stage whose model is the teacher of distillation."""
    return recipe.distillation_teacher
