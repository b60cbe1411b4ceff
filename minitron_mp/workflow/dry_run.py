"""A dry run: layout, sizes and memory of a recipe, and the state of its stages.

It needs neither a GPU nor torchrun.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from minitron_mp.config.recipe import Recipe, recipe_yaml
from minitron_mp.console import say, table
from minitron_mp.models.arch import Arch
from minitron_mp.workflow.graph import StageGraph
from minitron_mp.workflow.output_folder import stop_file_line
from minitron_mp.workflow.preflight import artifact_arch


def dry_run(recipe: Recipe, num_ranks: int | None, stage: str | None, accept: Sequence[str] = ()) -> None:
    """Print the resolved recipe, layout, sizes, memory per rank and the state of the stages.

    num_ranks: ranks to plan for; None: one copy of each model. stage: the stage to run; None for
    all. accept: settings that may differ from those of a checkpoint. InputError lists every problem
    that would stop the run.
    """
    from minitron_mp.models.hf_config import read_arch
    from minitron_mp.models.model_folder import has_weights
    from minitron_mp.planning.case import PlanningCase
    from minitron_mp.planning.dry_run import dry_run_rows

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
    base, teacher = (
        artifact_arch(graph.paths, name) if name in deleted else read_arch(folder, weights=weights)
        for folder, name in zip(models, imports)
    )
    students, left_out = _students(recipe, base)
    student = max(students, key=lambda arch: arch.num_parameters())
    say(recipe_yaml(recipe))
    table(
        "layout and memory",
        ("what", "value"),
        dry_run_rows(base, PlanningCase(student, teacher, recipe, ranks)),
    )
    if recipe.search:
        _show_candidates(students, left_out, recipe.export.family)
    for line in graph.deleted_source_lines():
        say(line)
    if stop_file_line(recipe.root):
        say(stop_file_line(recipe.root))
    if weights:
        _show_unused_text(recipe, deleted)
        _show_stages(graph)
    else:
        say("the model folder has config.json but no weights, so the state of the stages is unknown")


def _ranks_of_one_copy(recipe: Recipe) -> int:
    """Return the ranks of the smallest job: one copy of the student, the teacher and the siblings."""
    teacher = recipe.teacher
    student_ranks = teacher.student_ranks or recipe.parallel.model_ranks
    return student_ranks + teacher.ranks_in(None) + sum(teacher.siblings.values())


def _students(recipe: Recipe, base: Arch) -> tuple[Sequence[Arch], str]:
    """Return the student, or the candidates of a search and a line about excluded combinations."""
    from minitron_mp.pruning.search_space import survey_candidates
    from minitron_mp.pruning.target import resolve_target

    if recipe.search:
        return survey_candidates(recipe, base)
    return [resolve_target(base, recipe.target, recipe.parallel.tp, recipe.export.family)], ""


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
        recipe.data, recipe.root, parts="data" not in deleted, held_out="texts" not in deleted
    )
    not_used = unused_text(sources).summary()
    if not_used:
        say(f"text that is not used: {not_used}")


def _show_stages(graph: StageGraph) -> None:
    """Print which stages are done, and why a stage must run again."""
    rows = []
    for name, path in graph.paths.items():
        differences = graph.why_not_done(name)
        if differences is None:
            state = "done"
        else:
            state = "again" if differences else "to do"
        rows.append((name, str(path), state, "; ".join(differences or [])))
    table("stages", ("stage", "artifact", "state", "differs"), rows)
