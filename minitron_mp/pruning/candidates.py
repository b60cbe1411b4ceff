"""The architectures that a search looks at: all combinations of the sizes to try that fit the budget, the layout and the export format.

Runs on a laptop. 2407.14679, search: combinations of layers, heads, MLP expansion and embedding size within 5 % of a number of parameters.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from minitron_mp.artifacts.files import read_json
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.pruning import SearchConfig, TargetConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import (
    FP8_MULTIPLE,
    Arch,
    fp8_problems,
    layout_problems,
)
from minitron_mp.models.families.export import export_problems
from minitron_mp.models.number_formats import BYTES
from minitron_mp.pruning.target import resolve_target, steps_down

SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups", "num_attention_heads")


class Trained(BaseModel):
    """After so many steps of short distillation; inf: the loss was no number."""

    steps: int
    loss: float
    kl: float
    seconds: float
    """Of this round by the clock, shared out evenly among the students distilled together; what came before a stop is not in it."""


class Candidate(BaseModel):
    """What was measured of one architecture. Losses are means over the held-out text, in nats a token."""

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
        """The one after so many steps of distillation, 0: as cut; inf where it was not measured or is no number.

        A round compares what was measured in it, also in a search that goes on and knows of later rounds.
        """
        found = {0: self.pruned_loss, **{row.steps: row.loss for row in self.distilled}}.get(steps)
        return math.inf if found is None or math.isnan(found) else found


def candidate_name(arch: Arch) -> str:
    """Short and unique among the candidates of one teacher; also the name of a folder."""
    return f"l{arch.num_layers}-h{arch.hidden_size}-f{arch.ffn_hidden_size}-a{arch.num_attention_heads}-g{arch.num_query_groups}"


def candidate_target(arch: Arch, align: int) -> TargetConfig:
    """The target that cuts a candidate."""
    return TargetConfig(align=align, **{size: getattr(arch, size) for size in SIZES})


def inference_bytes(arch: Arch, precision: str, batch_size: int, context: int) -> int:
    """Weights, without the vocabulary padding, and key-value cache, over all ranks."""
    cache = 2 * arch.num_layers * arch.num_query_groups * arch.kv_channels * context * batch_size
    return BYTES[precision] * (arch.num_parameters() + cache)


def training(recipe: Recipe) -> DistillConfig:
    """The settings of the short distillation: those of distill over search.steps, warm-up at most a tenth of them, no losses on states.

    Without a profile, and saved at once: several students' checkpoints would wait for each other.
    """
    assert recipe.search is not None
    d, steps = recipe.distill, recipe.search.steps
    plain = {"states": None, "profile": None, "async_save": False}
    return d.model_copy(
        update={"steps": steps, "warmup_steps": min(d.warmup_steps, steps // 10), "log_interval": 1, **plain}
    )


def layers_to_drop(recipe: Recipe, teacher: Arch) -> int:
    """Of the shallowest student that the recipe may come to."""
    if recipe.search is not None:
        return teacher.num_layers - min(arch.num_layers for arch in search_candidates(recipe, teacher))
    return (
        teacher.num_layers
        - resolve_target(teacher, recipe.target, recipe.parallel.tp, recipe.export.family).num_layers
    )


def search_candidates(recipe: Recipe, teacher: Arch) -> list[Arch]:
    """All candidates of a recipe with a section search: those of survey()."""
    return survey_candidates(recipe, teacher)[0]


def survey_candidates(recipe: Recipe, teacher: Arch) -> tuple[list[Arch], str]:
    """(candidates in order of their sizes, a line on the combinations that are left out for another reason than the budget, empty without any).

    Of a latency budget those that are to be measured. InputError names what leaves none.
    """
    search, tp = recipe.search, recipe.parallel.tp
    assert search is not None
    (budget, wanted), (least, most), unit = search.budget, search.bounds, recipe.target.align * tp

    def used(arch: Arch) -> float:
        if budget == "parameters":
            return arch.num_parameters()
        return (
            inference_bytes(
                arch, recipe.precision, search.batch_size, search.context or recipe.data.sequence_length
            )
            / 2**30
        )

    grid, fitting, seen = _grid(teacher, search, recipe.target.align, tp), [], []
    reasons: Counter[str] = Counter()
    possible = 0
    solved = not (search.ffn_hidden_size or search.mlp_expansion)
    others = [name for name in grid if name != "ffn_hidden_size"]
    for sizes in itertools.product(*(grid[name] for name in others)):
        arch = teacher.resized(**dict(zip(others, sizes)))
        if not search.num_attention_heads:
            arch = arch.resized(num_attention_heads=arch.num_query_groups * teacher.heads_per_group)

        def wide(f: int, arch: Arch = arch) -> Arch:
            return arch.resized(ffn_hidden_size=f)

        widths = steps_down(teacher.ffn_hidden_size, unit) if solved else grid["ffn_hidden_size"]
        if solved:  # the largest inside the budget; of parameters, which may be exceeded, the nearest
            i = min(bisect_left(widths, -wanted, key=lambda f: -used(wide(f))), len(widths) - 1)
            widths = [
                min(
                    widths[max(0, i - (budget == "parameters")) : i + 1],
                    key=lambda f: abs(used(wide(f)) - wanted),
                )
            ]
        elif search.mlp_expansion:
            nearest = {round(e * arch.hidden_size / unit) * unit for e in search.mlp_expansion}
            widths = sorted((f for f in nearest if 0 < f <= teacher.ffn_hidden_size), reverse=True)
            reasons[
                f"mlp_expansion x hidden_size is 0 or above the teacher's ffn_hidden_size {teacher.ffn_hidden_size}"
            ] += len(nearest) - len(widths)
        tried = [(arch, _why_not(arch, teacher, recipe)) for arch in map(wide, widths) if arch != teacher]
        reasons.update(why for _, why in tried if why)
        archs = [arch for arch, why in tried if not why]
        possible += len(archs)
        if budget != "latency_ms":
            seen += map(used, archs)
            archs = [arch for arch in archs if least <= used(arch) <= most]
        fitting += archs
    left_out = _left_out(reasons, possible)
    if not fitting:
        if not seen:
            raise InputError(
                f"no candidate of search is possible, whatever the budget: {left_out or 'the only one is the teacher; list smaller sizes'}"
            )
        near = f"the nearest one has {min(seen, key=lambda value: abs(value - wanted)):,.4g}"
        other = f" ({left_out})" if left_out else ""
        raise InputError(
            f"no candidate of search has {least:,.4g} to {most:,.4g} ({budget}); {near}: change the budget, or list other sizes{other}"
        )
    if len(fitting) > search.max_candidates:
        raise InputError(
            f"search has {len(fitting)} candidates, search.max_candidates is {search.max_candidates}: list fewer sizes, or raise it"
        )
    return fitting, left_out


def _why_not(arch: Arch, teacher: Arch, recipe: Recipe) -> str:
    """What stops a candidate, in words that many share, so that they can be counted; empty: it can be cut, run and exported."""
    p, depth, heads, groups = recipe.parallel, recipe.depth, arch.num_attention_heads, arch.num_query_groups
    free = teacher.num_layers - depth.protect_first - depth.protect_last
    if (stages := p.pp * (p.vpp or 1)) > arch.num_layers:
        return f"num_layers below the {stages} pipeline stages (pp x vpp)"
    if teacher.num_layers - arch.num_layers > free:
        return f"depth.protect_first and protect_last leave {max(0, free)} layers that may go; protect fewer, or keep more layers"
    if heads % groups:
        return f"num_attention_heads {heads} is no multiple of num_query_groups {groups}"
    if arch.heads_per_group > teacher.heads_per_group:
        return f"num_attention_heads {heads} in {groups} query groups are more a group than the teacher's {teacher.heads_per_group}"
    if problems := layout_problems(arch, p.tp):
        return problems[0]
    if recipe.distill.fp8 and fp8_problems(arch, p.tp, p.tokens_of_sample(recipe.data.sequence_length)):
        return f"distill.fp8 wants multiples of {FP8_MULTIPLE} of all widths on a rank; target.align: {FP8_MULTIPLE} keeps to them"
    if unexportable := export_problems(arch, recipe.export.family):
        return unexportable[0].reason
    return ""


def _left_out(reasons: Counter[str], possible: int) -> str:
    """The commonest reasons, counted."""
    count, common = sum(reasons.values()), reasons.most_common(3)
    told = [f"{why} ({n:,})" for why, n in common if n]
    if rest := count - sum(n for _, n in common):
        told.append(f"others ({rest:,})")
    return f"{count:,} of {count + possible:,} combinations left out: {', '.join(told)}" if told else ""


def _grid(teacher: Arch, search: SearchConfig, align: int, tp: int) -> dict[str, list[int]]:
    """Sizes to try; InputError for those that cannot be cut."""
    unit = math.ceil(teacher.hidden_size / 16 / align) * align
    defaults: dict[str, list[int]] = {
        "num_layers": list(range(teacher.num_layers, math.ceil(0.9 * teacher.num_layers) - 1, -1)),
        "hidden_size": [h for h in steps_down(teacher.hidden_size, unit) if 2 * h >= teacher.hidden_size],
        "ffn_hidden_size": [teacher.ffn_hidden_size],
        "num_query_groups": [teacher.num_query_groups],
        "num_attention_heads": [teacher.num_attention_heads],
    }
    steps = {"hidden_size": align, "ffn_hidden_size": align * tp}
    problems, grid = [], {}
    for name, default in defaults.items():
        grid[name] = sorted(set(getattr(search, name)), reverse=True) or default
        largest = getattr(teacher, name)
        wrong = [n for n in grid[name] if not 0 < n <= largest or (n != largest and n % steps.get(name, 1))]
        if wrong:
            problems.append(
                f"search.{name} {', '.join(map(str, wrong))}: give multiples of {steps.get(name, 1)} up to the teacher's {largest}"
            )
    refuse("these sizes cannot be cut:", problems)
    return grid


def front(points: Sequence[tuple[str, float, float, bool]]) -> list[str]:
    """Names of the points (name, x, y, ...) that no other one beats: less or equal on both axes, and less on one."""
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
    """(header, a line a candidate, best first) of a table that fits 80 columns; names say the sizes.

    * where no other one has both less parameters and less loss, among those distilled as far.
    """
    ordered = sorted(found, key=lambda c: (-len(c.distilled), c.loss, c.name))
    timed = any(c.latency_s is not None for c in found)
    best = set()
    for count in {len(c.distilled) for c in found}:
        best |= set(
            front([(c.name, c.parameters, c.loss, c.chosen) for c in found if len(c.distilled) == count])
        )
    lines = []
    for c in ordered:
        after = f"{c.distilled[-1].loss:.4f} ({c.distilled[-1].steps})" if c.distilled else ""
        speed = (f"{1000 * c.latency_s:,.1f}" if c.latency_s is not None else "",) * timed
        size = f"{c.parameters / 1e9:.2f}B" if c.parameters >= 1e9 else f"{c.parameters / 1e6:.1f}M"
        lines.append(
            (
                f"{c.name}{' *' * (c.name in best)}",
                size,
                f"{c.memory_gib:.1f}",
                *speed,
                f"{c.pruned_loss:.4f}",
                after,
            )
        )
    return ("candidate", "params", "GiB", *("ms",) * timed, "pruned", "distilled"), lines
