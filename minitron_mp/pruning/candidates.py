"""What a search measures of its candidates: names, records, the Pareto front and the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from minitron_mp.artifacts.files import read_json
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.pruning import TargetConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.models.arch import Arch
from minitron_mp.models.axes import AXES
from minitron_mp.models.number_formats import BYTES
from minitron_mp.pruning.target import SIZE_FIELDS


class Trained(BaseModel):
    """After so many steps of short distillation; inf: the loss was no number."""

    steps: int
    loss: float
    kl: float
    seconds: float
    """Of this round by the clock, shared out evenly among the students distilled together.

    Without what came before a stop.
    """


class Candidate(BaseModel):
    """What was measured of one architecture.

    Losses are means over the held-out text, in nats per token.
    """

    name: str
    arch: Arch
    parameters: int
    memory_gib: float
    latency_s: float | None = None
    pruned_loss: float | None = None
    distilled: list[Trained] = []
    """One a round."""
    chosen: bool = False

    @property
    def loss(self) -> float:
        """The last one measured."""
        return self.loss_after(self.distilled[-1].steps if self.distilled else 0)

    def loss_after(self, steps: int) -> float:
        """The loss after so many steps of distillation (0: as cut); inf where there is no number.

        A round compares what was measured in it, also in a resumed search that has later rounds.
        """
        found = {0: self.pruned_loss, **{row.steps: row.loss for row in self.distilled}}.get(steps)
        return math.inf if found is None or math.isnan(found) else found


def candidate_name(arch: Arch) -> str:
    """Short and unique among the candidates of one teacher; also the name of a folder."""
    sizes = [size for axis in AXES.values() for size in reversed(axis.sizes)]
    widths = [f"{size.letter}{getattr(arch, size.field)}" for size in sizes]
    return "-".join([f"l{arch.num_layers}", *widths])


def candidate_target(arch: Arch, align: int) -> TargetConfig:
    """The target that cuts a candidate."""
    return TargetConfig(align=align, **{field: getattr(arch, field) for field in SIZE_FIELDS})


def inference_bytes(arch: Arch, precision: str, batch_size: int, context: int) -> int:
    """Weights, without the vocabulary padding, and key-value cache, over all ranks."""
    key_values = 2 * sum(block.num_query_groups for block in arch.blocks)
    cache = key_values * arch.kv_channels * context * batch_size
    return BYTES[precision] * (arch.num_parameters() + cache)


def training(recipe: Recipe) -> DistillConfig:
    """The settings of the short distillation: those of distill over search.steps.

    The warm-up is at most a tenth of them. Without losses on states and without a profile.
    Checkpoints are saved synchronously: those of several students would wait for each other.
    """
    assert recipe.search is not None
    d, steps = recipe.distill, recipe.search.steps
    plain = {"states": None, "profile": None, "async_save": False}
    return d.model_copy(
        update={"steps": steps, "warmup_steps": min(d.warmup_steps, steps // 10), "log_interval": 1, **plain}
    )


def front(points: Sequence[tuple[str, float, float, bool]]) -> list[str]:
    """Names of the points (name, x, y, ...) that no other one beats.

    A point beats another by being less or equal on both axes, and less on one.
    """
    best, names = float("inf"), []
    for name, _, y, _ in sorted(points, key=lambda point: point[1:3]):
        if y < best:
            best = y
            names.append(name)
    return names


def chosen(path: Path) -> Arch:
    """The architecture that a search chose."""
    content = read_json(path, "search --force")
    return next(Candidate.model_validate(row).arch for row in content["candidates"] if row["chosen"])


def shown(found: Sequence[Candidate]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, one line per candidate, best first) of a table that fits 80 columns.

    Names contain the sizes. A star marks those on the Pareto front of parameters and loss, among
    those distilled for as many steps.
    """
    ordered = sorted(found, key=lambda c: (-len(c.distilled), c.loss, c.name))
    best: set[str] = set()
    for count in {len(c.distilled) for c in found}:
        equally_far = [c for c in found if len(c.distilled) == count]
        best |= set(front([(c.name, c.parameters, c.loss, c.chosen) for c in equally_far]))
    header = ["candidate", "params", "GiB", "pruned", "distilled"]
    lines = [_cells(c, c.name in best) for c in ordered]
    if any(c.latency_s is not None for c in found):
        header.insert(3, "ms")
        for c, line in zip(ordered, lines):
            line.insert(3, "" if c.latency_s is None else f"{1000 * c.latency_s:,.1f}")
    return tuple(header), [tuple(line) for line in lines]


def _cells(c: Candidate, is_best: bool) -> list[str]:
    after = f"{c.distilled[-1].loss:.4f} ({c.distilled[-1].steps})" if c.distilled else ""
    size = f"{c.parameters / 1e9:.2f}B" if c.parameters >= 1e9 else f"{c.parameters / 1e6:.1f}M"
    name = f"{c.name} *" if is_best else c.name
    return [name, size, f"{c.memory_gib:.1f}", f"{c.pruned_loss:.4f}", after]
