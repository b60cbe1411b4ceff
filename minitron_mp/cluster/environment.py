"""What the environment of every rank should hold for a recipe, each variable with its reason, and which nodes have which role.

launch/env.sh asks for it on each node before the ranks start; what is set there already, by the site or by hand, stays. Nothing here needs
torch or a GPU: the first node may be a login node.
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
    """ranks: started on each node. cores: of it, that this job may use. scratch: folder on a disk of its own."""

    ranks: int
    cores: int
    scratch: Path


@dataclass(frozen=True)
class Variable:
    """value: None where the recipe has no use for it."""

    name: str
    reason: str
    value: Callable[[Recipe, Node], object | None]


def _layouts(recipe: Recipe) -> list[ParallelConfig]:
    return [recipe.parallel, *([recipe.teacher.parallel] if recipe.teacher.is_remote else [])]


def _if_cut(recipe: Recipe, node: Node) -> int | None:
    return 1 if any(p.tp > 1 or p.cp > 1 for p in _layouts(recipe)) else None


def _if_overlap(value: int) -> Callable[[Recipe, Node], int | None]:
    return lambda recipe, node: (
        value if any(t.overlap for t in (recipe.distill, recipe.correct) if t) else None
    )


VARIABLES = (
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "tp or cp above 1: with one hardware queue a collective starts before the product that hides it (Hopper and older; more on Blackwell)",
        _if_cut,
    ),
    Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "two models of different widths, and their checkpoints, take turns in memory: segments that grow leave no holes",
        lambda recipe, node: "expandable_segments:True",
    ),
    Variable(
        "NCCL_GRAPH_REGISTER",
        "expandable segments and buffers that NCCL registers for CUDA graphs do not go together",
        lambda recipe, node: 0,
    ),
    Variable(
        "TORCH_NCCL_HIGH_PRIORITY",
        "overlap: collectives get their share of the GPU before the computation beside them",
        _if_overlap(1),
    ),
    Variable(
        "NVTE_FWD_LAYERNORM_SM_MARGIN",
        "overlap: norms of Transformer Engine leave these multiprocessors to NCCL",
        _if_overlap(16),
    ),
    Variable("NVTE_BWD_LAYERNORM_SM_MARGIN", "overlap: as above, backward", _if_overlap(16)),
    Variable(
        "OMP_NUM_THREADS",
        "cores of the node over its ranks; torchrun would set 1",
        lambda recipe, node: max(1, min(16, node.cores // node.ranks)),
    ),
    Variable(
        "TRITON_CACHE_DIR",
        "kernels are compiled on a disk of the node; on a shared one all ranks would write at once",
        lambda recipe, node: node.scratch / "triton",
    ),
    Variable(
        "TOKENIZERS_PARALLELISM",
        "threads of the tokenizer do not outlive the processes that are forked later",
        lambda recipe, node: "false",
    ),
    Variable(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
        "so long, in seconds, torchrun lets ranks save after SIGTERM; its own 30 are few",
        lambda recipe, node: 120,
    ),
    Variable("PYTHONUNBUFFERED", "a line is in the log when it was said", lambda recipe, node: 1),
    Variable("PYTHONFAULTHANDLER", "a crash in native code names the line of Python", lambda recipe, node: 1),
)


def this_node(ranks: int) -> Node:
    """The machine at hand, as far as this process may use it."""
    return Node(ranks, len(os.sched_getaffinity(0)), Path(tempfile.gettempdir()) / f"minitron-{os.getuid()}")


def lines(recipe: Recipe, node: Node, num_nodes: int) -> list[str]:
    """What a shell evaluates: one `export NAME=VALUE  # reason` each, and comments; InputError when the roles do not fit the ranks."""
    given = [
        (v.name, str(value), v.reason) for v in VARIABLES if (value := v.value(recipe, node)) is not None
    ]
    output = (
        "MINITRON_OUTPUT",
        str(recipe.root.absolute()),
        "where the ranks look for the file stop, and leave the file finished",
    )
    comments = [f"# {text}" for text in places(recipe, num_nodes, node.ranks)]
    return [
        f"export {name}={shlex.quote(value)}  # {reason}" for name, value, reason in (output, *given)
    ] + comments


def places(recipe: Recipe, num_nodes: int, ranks: int) -> list[str]:
    """A sentence for each role: its ranks, and the nodes that they are on, in torchrun's order; InputError when they do not add up.

    torchrun numbers the ranks of a node through, so a role has whole nodes when its ranks are a multiple of a node's.
    """
    t, size = recipe.teacher, num_nodes * ranks
    others = (
        {**{f"sibling {path}": count for path, count in t.siblings.items()}, "teacher": t.ranks_in(size)}
        if t.is_remote
        else {}
    )
    sizes = {"student" if others else "job": t.student_ranks or size - sum(others.values()), **others}
    problems, found, first = [], [], 0
    if min(sizes.values()) < 1 or sum(sizes.values()) != size:
        parts = " + ".join(f"{count} ({role})" for role, count in sizes.items())
        refuse(
            "the roles do not fit the job:",
            [
                f"{num_nodes} nodes x {ranks} ranks are {size}, the roles have {parts}; start other nodes, or change teacher.*"
            ],
        )
    for role, count in sizes.items():
        layout = t.parallel if role == "teacher" else None if role.startswith("sibling") else recipe.parallel
        if layout and count % layout.model_ranks:
            problems.append(
                f"the {role} has {count} ranks, its tp x pp x cp needs a multiple of {layout.model_ranks}; change nodes, ranks or the layout"
            )
        nodes = (first // ranks, (first + count - 1) // ranks)
        shared = (
            ""
            if first % ranks == 0 and (first + count) % ranks == 0
            else ", not alone: a multiple of a node's ranks would have its own network"
        )
        found.append(
            f"{role}: ranks {first} to {first + count - 1}, nodes {nodes[0]} to {nodes[1]}{shared if others and num_nodes > 1 else ''}"
        )
        first += count
    refuse("the layout does not fit the job:", problems)
    return found
