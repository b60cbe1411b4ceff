"""The commands of the stages."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from minitron_mp.cli_options import (
    Accept,
    DryRun,
    Force,
    FromStep,
    Overrides,
    RecipeFile,
    Round,
    ShardOption,
    Step,
    World,
)
from minitron_mp.config.recipe import Recipe, load_recipe
from minitron_mp.errors import InputError
from minitron_mp.workflow.changes import ResumeOptions, accepted_names
from minitron_mp.workflow.stage import Stage


def add_stage_command(app: typer.Typer, stage: Stage) -> None:
    """Add the command of a stage, with the options that the stage has."""
    help_text = stage.help + (f" Needs {stage.requirement}." if stage.requirement else "")
    if stage.run_share is not None:
        _add_command_with_shard(app, stage, help_text)
    elif stage.has_checkpoints:
        _add_training_command(app, stage, help_text)
    elif stage.reads_saved_steps:
        _add_command_with_step(app, stage, help_text)
    else:
        _add_plain_command(app, stage, help_text)


def _add_plain_command(app: typer.Typer, stage: Stage, help_text: str) -> None:
    @app.command(stage.name, help=help_text)
    def command(
        recipe: RecipeFile,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        world: World = None,
        force: Force = False,
        round: Round = "",
    ) -> None:
        _run_stage(stage.name, load_recipe(recipe, overrides or []).of_round(round), dry_run, world, force)


def _add_training_command(app: typer.Typer, stage: Stage, help_text: str) -> None:
    @app.command(stage.name, help=help_text)
    def command(
        recipe: RecipeFile,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        world: World = None,
        force: Force = False,
        round: Round = "",
        accept: Accept = "",
        from_step: FromStep = None,
    ) -> None:
        resolved = load_recipe(recipe, overrides or []).of_round(round)
        names = accepted_names(accept, resolved)
        if dry_run:
            print_dry_run(resolved, world, stage.name, names)
            return
        refuse_world(world)
        from minitron_mp.workflow.run import run_stage

        run_stage(stage.name, resolved, force=force, resume=ResumeOptions(names, from_step))


def _add_command_with_step(app: typer.Typer, stage: Stage, help_text: str) -> None:
    @app.command(stage.name, help=help_text)
    def command(
        recipe: RecipeFile,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        world: World = None,
        force: Force = False,
        round: Round = "",
        step: Step = "",
    ) -> None:
        _run_stage(
            stage.name, load_recipe(recipe, overrides or []).of_round(round), dry_run, world, force, step
        )


def _add_command_with_shard(app: typer.Typer, stage: Stage, help_text: str) -> None:
    @app.command(stage.name, help=help_text)
    def command(
        recipe: RecipeFile,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        world: World = None,
        force: Force = False,
        round: Round = "",
        shard: ShardOption = None,
    ) -> None:
        resolved = load_recipe(recipe, overrides or []).of_round(round)
        if shard is None or dry_run:
            _run_stage(stage.name, resolved, dry_run, world, force)
            return
        refuse_world(world)
        from minitron_mp.workflow.shares import run_share

        run_share(stage.name, resolved, shard, force=force)


def _run_stage(
    name: str, recipe: Recipe, dry_run: bool, world: int | None, force: bool, step: str = ""
) -> None:
    if dry_run:
        print_dry_run(recipe, world, name)
        return
    refuse_world(world)
    from minitron_mp.workflow.run import run_stage

    run_stage(name, recipe, force=force, step=step)


def print_dry_run(recipe: Recipe, world: int | None, stage: str | None, accept: Sequence[str] = ()) -> None:
    """Print the dry run of a stage, or of all stages (None)."""
    from minitron_mp.workflow.dry_run import dry_run

    dry_run(recipe, world, stage, accept)


def refuse_world(world: int | None) -> None:
    """Raise InputError if --world is given without --dry-run."""
    if world is not None:
        raise InputError(
            "--world is for --dry-run; a run has the ranks that torchrun starts (--nproc-per-node)"
        )
