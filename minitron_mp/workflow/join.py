"""The ranks of a job: one world, or one world for each role when the teacher is remote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from minitron_mp.config.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from minitron_mp.distributed.world import World


def co_student_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """Return role -> recipe of all students of a remote teacher.

    All recipes use the teacher section of the first student.
    """
    siblings = {
        f"sibling {path}": load_recipe(path).model_copy(update={"teacher": recipe.teacher})
        for path in recipe.teacher.siblings
    }
    return {"student": recipe, **siblings}


@contextmanager
def join_any_ranks(recipe: Recipe) -> Iterator[World]:
    """Join all ranks of the job, whatever their number, for a stage that builds no model."""
    from minitron_mp.config.parallel import ParallelConfig
    from minitron_mp.distributed.preemption import watch_for_preemption
    from minitron_mp.distributed.world import join_world

    with (
        join_world(ParallelConfig(), seed=recipe.seed, timeout_minutes=recipe.timeout_minutes) as world,
        watch_for_preemption(recipe.run.root) as preemption,
    ):
        yield replace(world, preemption=preemption)


@contextmanager
def join_ranks(recipe: Recipe) -> Iterator[World]:
    """Join the ranks of the job, or the ranks of the same role when the teacher is remote.

    After the ranks have connected, SIGTERM requests a checkpoint. Before that it ends the process.
    """
    from minitron_mp.distributed.launcher import num_job_ranks
    from minitron_mp.distributed.preemption import watch_for_preemption
    from minitron_mp.distributed.roles import join_roles
    from minitron_mp.distributed.world import join_world

    teacher = recipe.teacher
    if not teacher.is_remote:
        with (
            join_world(recipe.parallel, seed=recipe.seed, timeout_minutes=recipe.timeout_minutes) as world,
            watch_for_preemption(recipe.run.root) as preemption,
        ):
            yield replace(world, preemption=preemption)
        return
    job_size = num_job_ranks()
    students = co_student_recipes(recipe)
    teacher_ranks = teacher.ranks_in(job_size)
    student_ranks = teacher.student_ranks or max(0, job_size - teacher_ranks - sum(teacher.siblings.values()))
    layouts = {"student": (student_ranks, recipe.parallel)}
    for path, ranks in teacher.siblings.items():
        role = f"sibling {path}"
        layouts[role] = (ranks, students[role].parallel)
    layouts["teacher"] = (teacher_ranks, teacher.parallel)
    with join_roles(
        layouts,
        seed=recipe.seed,
        timeout_minutes=recipe.timeout_minutes,
        stream_timeout_s=teacher.timeout_s,
    ) as world:
        output = students[world.role].run.root if world.role in students else recipe.run.root
        with watch_for_preemption(output) as preemption:
            yield replace(world, preemption=preemption)
