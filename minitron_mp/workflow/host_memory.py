"""Whether a node has the host memory for a remote teacher's signals for the held-out text."""

from __future__ import annotations

from minitron_mp.config.recipe import Recipe
from minitron_mp.models.arch import Arch


def host_memory_problems(recipe: Recipe, teacher: Arch, student_ranks: int) -> list[str]:
    """Return a sentence if the signals do not fit into the free memory of this node.

    The student's nodes are taken to be equal. student_ranks: of this student.
    """
    import psutil

    from minitron_mp.distributed.launcher import ranks_per_node
    from minitron_mp.planning.memory import GIB, held_out_signal_bytes

    # The ranks of a pipeline stage are consecutive.
    ranks = min(ranks_per_node(), student_ranks // recipe.parallel.pp)
    needed = ranks * held_out_signal_bytes(teacher, recipe, student_ranks)
    free = psutil.virtual_memory().available
    if needed <= free:
        return []
    distill = recipe.distill
    return [
        f"distill.valid_batches {distill.valid_batches} x global_batch_size {distill.global_batch_size}: the "
        f"teacher's signals for the validations need {needed / GIB:,.1f} GiB of host memory on a node, "
        f"{free / GIB:,.1f} GiB are free; lower valid_batches, or give a teacher.payload with fewer bytes "
        f"than {recipe.teacher.payload}"
    ]
