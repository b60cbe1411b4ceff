"""Section of the report with the commands, recipe and versions that made the student."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from minitron_mp.artifacts.files import RUN_LOG
from minitron_mp.artifacts.run_log import RunRecord, software
from minitron_mp.config.recipe import RESOLVED_RECIPE, recipe_yaml
from minitron_mp.config.rounds import split_command
from minitron_mp.data.unused import load_unused
from minitron_mp.report.document import Code, Part, Section, Table
from minitron_mp.report.project import Project


def provenance_section(project: Project, num_ranks: int | None, run_log: Mapping[str, RunRecord]) -> Section:
    """Build the section with commands, recipe and versions of the stages, from the run log.

    num_ranks: ranks of the student; None means one replica.
    """
    recipe, stages = project.recipe, project.all_stages
    commands = _commands(project, num_ranks or recipe.parallel.model_ranks, run_log)
    parts: list[Part] = [Code("\n".join(commands))]
    missing = [name for name in stages if name not in run_log]
    if missing:
        parts.append(
            f"The run log (`{RUN_LOG}`) has no entry for: {', '.join(missing)}. "
            "Their commands above use the recipe's layout."
        )
    parts += _unused_text(project.paths)
    versions = _versions(run_log) or list(software().items())
    parts += [
        "The recipe with all defaults:",
        Code(recipe_yaml(recipe.run)),
        Table(("component", "version"), versions, "left"),
    ]
    return Section("How it was made", parts)


def _commands(project: Project, num_ranks: int, run_log: Mapping[str, RunRecord]) -> list[str]:
    """Return commands that repeat the run: one for all stages if they used one launch, then one each."""
    recipe, stages = project.recipe, project.all_stages
    file = shlex.quote(str(recipe.run.root / RESOLVED_RECIPE))
    recipes = {each.round_name: each for each in recipe.earlier}
    launches = {
        name: (record.launcher, record.layout_overrides(recipes.get(split_command(name)[1], recipe)))
        for name, record in run_log.items()
        if stages[name].needs_ranks
    }
    job_size = num_ranks + recipe.teacher.ranks_in(None) + sum(recipe.teacher.siblings.values())
    launcher = f"torchrun --nproc-per-node {job_size} -m minitron_mp" if job_size > 1 else "minitron-mp"
    whole_job = [launch for name, launch in launches.items() if stages[name].meets_roles]
    usual = whole_job[0] if whole_job else (launcher, "")
    lines = []
    # Any ranks can run a stage with any_ranks, so its launch need not be that of the whole run.
    if len({launch for name, launch in launches.items() if not stages[name].any_ranks}) < 2:
        lines += [f"{usual[0]} compress {file}{usual[1]}", "", "# or stage by stage"]
    for name, stage in stages.items():
        start, layout = launches.get(name, usual) if stage.needs_ranks else ("minitron-mp", "")
        lines.append(f"{start} {project.command(name)} {file}{layout}")
    return [*lines, f"minitron-mp report {file}"]


def _unused_text(paths: Mapping[str, Path]) -> list[Part]:
    """Return a table of the text that is not used, or not as it is; [] if there is none."""
    rows = []
    for stage in ("data", "texts"):
        if stage in paths:
            rows += [(stage, *row) for row in load_unused(paths[stage]).rows()]
    if not rows:
        return []
    table = Table(("stage", "what", "number", "first names"), rows, "left")
    return ["Text that is not used, or not as it is:", table]


def _versions(run_log: Mapping[str, RunRecord]) -> list[tuple[str, str]]:
    """Return rows of software and device. Versions that differ are listed with their stages."""
    stages_by_version: dict[str, dict[str, list[str]]] = {}
    for stage, record in run_log.items():
        versions = dict(record.software)
        if record.device:
            versions["device"] = record.device
        for name, version in versions.items():
            stages_by_version.setdefault(name, {}).setdefault(version, []).append(stage)
    rows = []
    for name, stages_of in stages_by_version.items():
        if len(stages_of) == 1:
            rows.append((name, next(iter(stages_of))))
        else:
            texts = [f"{version} ({', '.join(stages)})" for version, stages in stages_of.items()]
            rows.append((name, "; ".join(texts)))
    return rows
