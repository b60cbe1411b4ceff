"""The candidates of a search: names, measurements, the Pareto front and the printed table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from minitron_mp.artifacts.files import first_problem, read_json
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.pruning import TargetConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.models.axes import AXES
from minitron_mp.models.number_formats import BYTES
from minitron_mp.pruning.target import SIZE_FIELDS


class Trained(BaseModel):
    """The result of `steps` steps of short distillation. A loss that is not finite is inf."""

    steps: int
    loss: float
    kl: float
    seconds: float
    """Wall-clock time of this round, divided evenly among the students distilled together.

    The time before an interruption is not included.
    """


class Candidate(BaseModel):
    """The measurements of one architecture.

    Losses are means over the held-out text, in nats per token.
    """

    name: str
    arch: Arch
    parameters: int
    memory_gib: float
    latency_s: float | None = None
    pruned_loss: float | None = None
    distilled: list[Trained] = []
    """One entry per round."""
    chosen: bool = False

    @property
    def loss(self) -> float:
        """The loss that was measured last."""
        return self.loss_after(self.distilled[-1].steps if self.distilled else 0)

    def loss_after(self, steps: int) -> float:
        """Return the loss after `steps` steps of distillation (0: not distilled), or inf without one.

        So a resumed search compares the losses of one round, even if it has later rounds.
        """
        loss = {0: self.pruned_loss, **{row.steps: row.loss for row in self.distilled}}.get(steps)
        return math.inf if loss is None or math.isnan(loss) else loss


def candidate_name(arch: Arch) -> str:
    """Return a short name, unique among the candidates of one teacher, that is also a folder name."""
    sizes = [size for axis in AXES.values() for size in reversed(axis.sizes)]
    widths = [f"{size.letter}{getattr(arch, size.field)}" for size in sizes]
    return "-".join([f"l{arch.num_layers}", *widths])


def candidate_target(arch: Arch, align: int) -> TargetConfig:
    """Return the target with the sizes of a candidate."""
    return TargetConfig(align=align, **{field: getattr(arch, field) for field in SIZE_FIELDS})


def inference_bytes(arch: Arch, precision: str, batch_size: int, context: int) -> int:
    """Return the bytes of weights (without vocabulary padding) and key-value cache over all ranks."""
    key_values = 2 * sum(block.num_query_groups for block in arch.blocks)
    cache = key_values * arch.kv_channels * context * batch_size
    return BYTES[precision] * (arch.num_parameters() + cache)


def training(recipe: Recipe) -> DistillConfig:
    """Return the settings of the short distillation: distill with search.steps steps.

    The warm-up is at most a tenth of the steps. The decay of schedule wsd has the same share of the
    steps as in distill. There are no losses on states, no profile, no validations and no skipped
    batches. Checkpoints are saved synchronously, because asynchronous saves of several students would wait
    for each other.
    """
    assert recipe.search is not None
    d, steps = recipe.distill, recipe.search.steps
    plain: dict[str, object] = {
        "states": None,
        "profile": None,
        "async_save": False,
        "log_interval": 1,
        "skip_batches": [],
        "valid_interval": 0,
        "patience": None,
    }
    decay_steps = None if d.decay_steps is None else max(1, d.decay_steps * steps // d.steps)
    warmup_steps = min(d.warmup_steps, steps // 10)
    lengths = {"steps": steps, "warmup_steps": warmup_steps, "decay_steps": decay_steps}
    return d.model_copy(update={**lengths, **plain})


def front(points: Sequence[tuple[str, float, float, bool]]) -> list[str]:
    """Return the names of the points (name, x, y, ...) on the Pareto front.

    A point is on it if no other point is less or equal on both axes and less on one.
    """
    best, names = float("inf"), []
    for name, _, y, _ in sorted(points, key=lambda point: point[1:3]):
        if y < best:
            best = y
            names.append(name)
    return names


def chosen(path: Path) -> Arch:
    """Read the architecture that a search chose; InputError for a file in another format."""
    content = read_json(path, "search --force")
    try:
        return next(Candidate.model_validate(row).arch for row in content["candidates"] if row["chosen"])
    except ValidationError as error:
        raise InputError(
            f"{path} is in another format ({first_problem(error)}); this version reads candidates with "
            f"{', '.join(Candidate.model_fields)}; run `minitron-mp search --force` again"
        ) from error


def shown(candidates: Sequence[Candidate]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return (header, one line per candidate, the best first) of a table that fits 80 columns.

    Names contain the sizes. A star marks the Pareto front of parameters and loss. Each number of
    distillation rounds has a separate front.
    """
    ordered = sorted(candidates, key=lambda c: (-len(c.distilled), c.loss, c.name))
    best: set[str] = set()
    for count in {len(c.distilled) for c in candidates}:
        of_count = [c for c in candidates if len(c.distilled) == count]
        best |= set(front([(c.name, c.parameters, c.loss, c.chosen) for c in of_count]))
    header = ["candidate", "params", "GiB", "pruned", "distilled"]
    lines = [_cells(c, c.name in best) for c in ordered]
    if any(c.latency_s is not None for c in candidates):
        header.insert(3, "ms")
        for c, line in zip(ordered, lines):
            line.insert(3, "" if c.latency_s is None else f"{1000 * c.latency_s:,.1f}")
    return tuple(header), [tuple(line) for line in lines]


def _cells(c: Candidate, is_best: bool) -> list[str]:
    after = f"{c.distilled[-1].loss:.4f} ({c.distilled[-1].steps})" if c.distilled else ""
    size = f"{c.parameters / 1e9:.2f}B" if c.parameters >= 1e9 else f"{c.parameters / 1e6:.1f}M"
    name = f"{c.name} *" if is_best else c.name
    return [name, size, f"{c.memory_gib:.1f}", f"{c.pruned_loss:.4f}", after]
