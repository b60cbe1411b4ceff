"""Environment variables that each node needs for a recipe, and the nodes of each role.

launch/env.sh evaluates the output on each node before the ranks start. Variables that the site or
the user has already set are kept. This module needs neither torch nor a GPU, because the command
may run on a login node.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.errors import refuse


@dataclass(frozen=True)
class Node:
    """One node of the job."""

    ranks: int
    """Number of ranks on each node."""
    cores: int
    """CPU cores that this job may use."""
    scratch: Path
    """Folder on a local disk."""


@dataclass(frozen=True)
class Variable:
    """An environment variable, the reason for it, and a function that returns its value.

    The value is None if the recipe does not need the variable.
    """

    name: str
    reason: str
    value: Callable[[Recipe, Node], object | None]


def _one_if_split(recipe: Recipe, node: Node) -> int | None:
    layouts = [recipe.parallel]
    if recipe.teacher.is_remote:
        layouts.append(recipe.teacher.parallel)
    return 1 if any(p.tp > 1 or p.cp > 1 for p in layouts) else None


def _if_overlap(value: int) -> Callable[[Recipe, Node], int | None]:
    def value_of(recipe: Recipe, node: Node) -> int | None:
        in_correction = recipe.correct is not None and recipe.correct.overlap
        return value if recipe.distill.overlap or in_correction else None

    return value_of


VARIABLES = (
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "tp or cp above 1: one hardware queue starts a collective before the product that hides it "
        "(Hopper and older; Blackwell uses more queues)",
        _one_if_split,
    ),
    Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "two models of different widths and their checkpoints alternate in memory: growing segments avoid "
        "fragmentation",
        lambda recipe, node: "expandable_segments:True",
    ),
    Variable(
        "NCCL_GRAPH_REGISTER",
        "expandable segments do not work with buffers that NCCL registers for CUDA graphs",
        lambda recipe, node: 0,
    ),
    Variable(
        "TORCH_NCCL_HIGH_PRIORITY",
        "overlap: collectives get GPU resources before concurrent computation",
        _if_overlap(1),
    ),
    Variable(
        "NVTE_FWD_LAYERNORM_SM_MARGIN",
        "overlap: Transformer Engine norms leave these multiprocessors to NCCL",
        _if_overlap(16),
    ),
    Variable("NVTE_BWD_LAYERNORM_SM_MARGIN", "overlap: the same for the backward pass", _if_overlap(16)),
    Variable(
        "OMP_NUM_THREADS",
        "cores of the node divided by its ranks; torchrun would set 1",
        lambda recipe, node: max(1, min(16, node.cores // node.ranks)),
    ),
    Variable(
        "TRITON_CACHE_DIR",
        "kernels are compiled on a local disk; on a shared one all ranks would write at once",
        lambda recipe, node: node.scratch / "triton",
    ),
    Variable(
        "TOKENIZERS_PARALLELISM",
        "tokenizer threads would break processes that are forked later",
        lambda recipe, node: "false",
    ),
    Variable(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
        "seconds that torchrun gives ranks to save after SIGTERM; its default of 30 is too short",
        lambda recipe, node: 120,
    ),
    Variable(
        "TORCH_FR_BUFFER_SIZE",
        "flight recorder: each rank keeps its last collectives; 0 turns it off",
        lambda recipe, node: 2000,
    ),
    Variable(
        "TORCH_NCCL_DUMP_ON_TIMEOUT",
        "flight recorder: all ranks write their collectives when one times out",
        lambda recipe, node: 1,
    ),
    Variable(
        "TORCH_FR_DUMP_TEMP_FILE",
        "flight recorder: files of the ranks, which `torchfrtrace` reads",
        lambda recipe, node: recipe.root.absolute() / "logs" / "nccl_trace_rank_",
    ),
    Variable("PYTHONUNBUFFERED", "log lines appear immediately", lambda recipe, node: 1),
    Variable("PYTHONFAULTHANDLER", "a crash in native code prints the Python stack", lambda recipe, node: 1),
)


def this_node(ranks: int) -> Node:
    """Return the cores and the scratch folder that this process may use on this machine."""
    return Node(ranks, len(os.sched_getaffinity(0)), Path(tempfile.gettempdir()) / f"minitron-{os.getuid()}")


def environment_lines(recipe: Recipe, node: Node, num_nodes: int) -> list[str]:
    """Return lines for a shell: `export NAME=VALUE  # reason`, and comments on the roles.

    InputError if the roles do not fit the ranks.
    """
    output = str(recipe.root.absolute())
    lines = [
        f"export MINITRON_OUTPUT={shlex.quote(output)}  "
        "# folder where ranks look for the file stop, and write the file finished"
    ]
    for variable in VARIABLES:
        values = [variable.value(each, node) for each in recipe.all_rounds]
        needed = [value for value in values if value is not None]
        if needed:  # of a round; others may not need it
            lines.append(f"export {variable.name}={shlex.quote(str(needed[0]))}  # {variable.reason}")
    return lines + [f"# {line}" for line in role_lines(recipe, num_nodes, node.ranks)]


def role_lines(recipe: Recipe, num_nodes: int, ranks_per_node: int) -> list[str]:
    """Return one line for each role with its ranks and nodes in torchrun's order.

    torchrun numbers the ranks node by node, so a role has full nodes if its number of ranks is a
    multiple of the ranks per node. InputError if the roles do not fit the number of ranks.
    """
    job_size = num_nodes * ranks_per_node
    sizes = _role_sizes(recipe, job_size)
    if min(sizes.values()) < 1 or sum(sizes.values()) != job_size:
        parts = " + ".join(f"{count} ({role})" for role, count in sizes.items())
        refuse(
            "the roles do not fit the job:",
            [
                f"{num_nodes} nodes x {ranks_per_node} ranks are {job_size}, the roles need {parts}; start "
                "another number of nodes, or change teacher.*"
            ],
        )
    problems = []
    lines = []
    first = 0
    for role, count in sizes.items():
        layout = _role_layout(recipe, role)
        if layout and count % layout.model_ranks:
            problems.append(
                f"the {role} has {count} ranks; tp x pp x cp needs a multiple of {layout.model_ranks}: "
                "change nodes, ranks or the layout"
            )
        last = first + count - 1
        line = f"{role}: ranks {first} to {last}, nodes {first // ranks_per_node} to {last // ranks_per_node}"
        has_full_nodes = first % ranks_per_node == 0 and (first + count) % ranks_per_node == 0
        if len(sizes) > 1 and num_nodes > 1 and not has_full_nodes:
            line += ", shares a node and its network with another role"
        lines.append(line)
        first += count
    refuse("the layout does not fit the job:", problems)
    return lines


def _role_sizes(recipe: Recipe, job_size: int) -> dict[str, int]:
    """Return role -> number of ranks, in the order of the ranks."""
    t = recipe.teacher
    if not t.is_remote:
        return {"job": t.student_ranks or job_size}
    siblings = {f"sibling {path}": count for path, count in t.siblings.items()}
    teacher_ranks = t.ranks_in(job_size)
    student_ranks = t.student_ranks or job_size - teacher_ranks - sum(siblings.values())
    return {"student": student_ranks, **siblings, "teacher": teacher_ranks}


def _role_layout(recipe: Recipe, role: str) -> ParallelConfig | None:
    """Return the layout of a role; None for co-students, whose layout is in their recipes."""
    if role == "teacher":
        return recipe.teacher.parallel
    return None if role.startswith("sibling") else recipe.parallel
