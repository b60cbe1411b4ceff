"""A dry run: layout, sizes and memory of a recipe, and the state of its stages.

It needs neither a GPU nor torchrun.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from minitron_mp.config.recipe import Recipe, recipe_yaml
from minitron_mp.console import say, table
from minitron_mp.models.arch import Arch
from minitron_mp.workflow.graph import StageGraph
from minitron_mp.workflow.output_folder import stop_file_line
from minitron_mp.workflow.preflight import artifact_arch
from minitron_mp.workflow.settings import base_arch


def dry_run(recipe: Recipe, num_ranks: int | None, stage: str | None, accept: Sequence[str] = ()) -> None:
    """Print the resolved recipe, layout, sizes, memory per rank and the state of the stages.

    num_ranks: ranks to plan for; None: one copy of each model. stage: the stage to run; None for all
    stages of all rounds. accept: settings that may differ from those of a checkpoint. InputError
    lists every problem that would stop the run.
    """
    from minitron_mp.models.hf_config import read_arch
    from minitron_mp.models.model_folder import has_weights

    graph = StageGraph(recipe, accept)
    if stage is not None:
        graph.require_stage(stage)
    ranks = num_ranks or _ranks_of_one_copy(recipe)
    models = [Path(recipe.model), Path(recipe.teacher.model or recipe.model)]
    deleted = graph.deleted_sources()
    imports = ["import", "import-teacher" if recipe.teacher.model else "import"]
    weights = all(
        has_weights(folder)
        for folder, name in zip(models, imports)
        if folder.is_dir() and name not in deleted
    )
    graph.check(ranks, weights=weights)
    original, teacher = (
        artifact_arch(graph.paths, name) if name in deleted else read_arch(folder, weights=weights)
        for folder, name in zip(models, imports)
    )
    say(recipe_yaml(recipe.run))
    graphs = list(graph.rounds()) if stage is None else [graph]
    for each in graphs:
        base = base_arch(each.recipe) if each.earlier else original
        _show_round(each.recipe, base, teacher, ranks)
    for line in graph.deleted_source_lines():
        say(line)
    if stop_file_line(recipe.run.root):
        say(stop_file_line(recipe.run.root))
    if weights:
        _show_unused_text(recipe, deleted)
        for each in graphs:
            _show_stages(each, each.stages_of_compress() if stage is None else list(each.stages))
    else:
        say("the model folder has config.json but no weights, so the state of the stages is unknown")


def _show_round(recipe: Recipe, base: Arch, teacher: Arch, ranks: int) -> None:
    """Print layout, sizes and memory of a round. base: the model that it prunes, or trains."""
    from minitron_mp.planning.case import PlanningCase
    from minitron_mp.planning.dry_run import dry_run_rows

    students, left_out = _students(recipe, base)
    student = max(students, key=lambda arch: arch.num_parameters())
    rows = dry_run_rows(base, PlanningCase(student, teacher, recipe, ranks))
    table(f"layout and memory{_of_round(recipe)}", ("what", "value"), rows)
    if recipe.search:
        _show_candidates(students, left_out, recipe.export.family)


def _of_round(recipe: Recipe) -> str:
    return f", round {recipe.round_name}" if recipe.run.rounds else ""


def _ranks_of_one_copy(recipe: Recipe) -> int:
    """Return the ranks of the smallest job: one copy of the student, the teacher and the siblings.

    The layouts of all rounds divide them, if no teacher is remote.
    """
    sizes = []
    for each in recipe.all_rounds:
        teacher = each.teacher
        student_ranks = teacher.student_ranks or each.parallel.model_ranks
        sizes.append(student_ranks + teacher.ranks_in(None) + sum(teacher.siblings.values()))
    return math.lcm(*sizes)


def _students(recipe: Recipe, base: Arch) -> tuple[Sequence[Arch], str]:
    """Return the student, or the candidates of a search and a line about excluded combinations."""
    from minitron_mp.pruning.search_space import possible_students, survey_candidates

    if recipe.search:
        return survey_candidates(recipe, base)
    return possible_students(recipe, base), ""


def _show_candidates(students: Sequence[Arch], left_out: str, family: str | None) -> None:
    """Print the candidates. family: the one that the student is exported as, if it differs."""
    from minitron_mp.models.families.export import reader_rows
    from minitron_mp.pruning.candidates import candidate_name

    def rejecting(arch: Arch) -> str:
        exported = arch.model_copy(update={"family": family or arch.family})
        return ", ".join(reader for reader, reason in reader_rows(exported) if reason) or "-"

    table(
        "candidates of the search (the layout above is for the largest one)",
        ("candidate", "parameters", "export not readable by"),
        [(candidate_name(arch), f"{arch.num_parameters():,}", rejecting(arch)) for arch in students],
    )
    if left_out:
        say(left_out)


def _show_unused_text(recipe: Recipe, deleted: Collection[str]) -> None:
    """Print the files and folders of the text that are not read.

    deleted: finished stages whose text was deleted since.
    """
    from minitron_mp.data.sources import find_all_sources, unused_text

    sources = find_all_sources(
        recipe.data, recipe.run.root, parts="data" not in deleted, held_out="texts" not in deleted
    )
    not_used = unused_text(sources).summary()
    if not_used:
        say(f"text that is not used: {not_used}")


def _show_stages(graph: StageGraph, names: Sequence[str]) -> None:
    """Print which stages of a round are done, and why a stage must run again."""
    rows = []
    for name in names:
        path = graph.paths[name]
        differences = graph.why_not_done(name)
        if differences is None:
            state = "done"
        else:
            state = "again" if differences else "to do"
        rows.append((name, str(path), state, "; ".join(differences or [])))
    table(f"stages{_of_round(graph.recipe)}", ("stage", "artifact", "state", "differs"), rows)
