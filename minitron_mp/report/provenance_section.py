"""Section of the report with the commands, recipe and versions that made the student."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from minitron_mp.artifacts.run_log import FILE, RunRecord, software
from minitron_mp.config.recipe import RESOLVED_RECIPE, Recipe, recipe_yaml
from minitron_mp.report.document import Code, Part, Section, Table


def provenance_section(
    recipe: Recipe, stages: Sequence[str], num_ranks: int | None, run_log: Mapping[str, RunRecord]
) -> Section:
    """Build the section with commands, recipe and versions of the stages, from the run log.

    num_ranks: ranks of the student; None means one replica.
    """
    commands = _commands(recipe, stages, num_ranks or recipe.parallel.model_ranks, run_log)
    parts: list[Part] = [Code("\n".join(commands))]
    missing = [name for name in stages if name not in run_log]
    if missing:
        parts.append(
            f"The run log (`{FILE}`) has no entry for: {', '.join(missing)}. "
            "Their commands above use the recipe's layout."
        )
    versions = _versions(run_log) or list(software().items())
    parts += [
        "The recipe with all defaults:",
        Code(recipe_yaml(recipe)),
        Table(("component", "version"), versions, "left"),
    ]
    return Section("How it was made", parts)


def _commands(
    recipe: Recipe, stages: Sequence[str], num_ranks: int, run_log: Mapping[str, RunRecord]
) -> list[str]:
    """Return commands that repeat the run: one for all stages if they used one launch, then one each."""
    file = shlex.quote(str(recipe.root / RESOLVED_RECIPE))
    launches = {
        stage: (record.launcher, record.layout_overrides(recipe))
        for stage, record in run_log.items()
        if stage != "plan"
    }
    job_size = num_ranks + recipe.teacher.ranks_in(None) + sum(recipe.teacher.siblings.values())
    launcher = f"torchrun --nproc-per-node {job_size} -m minitron_mp" if job_size > 1 else "minitron-mp"
    usual = launches.get("distill", (launcher, ""))
    lines = []
    if len(set(launches.values())) < 2:
        lines += [f"{usual[0]} compress {file}{usual[1]}", "", "# or stage by stage"]
    for stage in stages:
        start, layout = ("minitron-mp", "") if stage == "plan" else launches.get(stage, usual)
        lines.append(f"{start} {stage} {file}{layout}")
    return [*lines, f"minitron-mp report {file}"]


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
