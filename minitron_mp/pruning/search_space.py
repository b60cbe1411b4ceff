"""The candidates of a search: combinations of sizes that fit budget, layout and export.

Runs on a laptop. 2407.14679, search: combinations of layers, heads, MLP expansion and embedding
size within 5 % of a number of parameters.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from minitron_mp.config.pruning import SearchConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import (
    FP8_MULTIPLE,
    Arch,
    fp8_problems,
    layout_problems,
)
from minitron_mp.models.axes import AXES
from minitron_mp.models.families.export import export_problems
from minitron_mp.pruning.candidates import inference_bytes
from minitron_mp.pruning.target import (
    SIZE_FIELDS,
    crowded_groups,
    fill_groups,
    resolve_target,
    size_step,
    steps_down,
)


def layers_to_drop(recipe: Recipe, teacher: Arch) -> int:
    """How many layers the shallowest student has less that the recipe may come to."""
    if recipe.search is not None:
        fewest = min(arch.num_layers for arch in search_candidates(recipe, teacher))
    else:
        family = recipe.export.family
        fewest = resolve_target(teacher, recipe.target, recipe.parallel.tp, family).num_layers
    return teacher.num_layers - fewest


def search_candidates(recipe: Recipe, teacher: Arch) -> list[Arch]:
    """All candidates of a recipe with a section search: those of survey_candidates()."""
    return survey_candidates(recipe, teacher)[0]


*STEPPED, SOLVED = (axis for axis in AXES.values() if axis.aligned)
"""Aligned axes. The last one is solved for the budget where a search lists no sizes for it."""


@dataclass
class _Survey:
    """The combinations of sizes seen so far."""

    fitting: list[Arch] = field(default_factory=list)
    """Inside the budget."""
    used: list[float] = field(default_factory=list)
    """Of the budget, by each that can be cut."""
    possible: int = 0
    """How many can be cut, run and exported."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why the others cannot."""


def survey_candidates(recipe: Recipe, teacher: Arch) -> tuple[list[Arch], str]:
    """(candidates in order of their sizes, a line on the combinations that are left out).

    The line is empty where only the budget leaves some out. Of a latency budget the candidates are
    those to be measured. InputError names what leaves none.
    """
    search = recipe.search
    assert search is not None
    grid = _grid(teacher, search, recipe.target.align, recipe.parallel.tp)
    listed = [name for name in SIZE_FIELDS if getattr(search, name, None)]
    outer = {name: sizes for name, sizes in grid.items() if name != SOLVED.size.field}
    survey = _Survey()
    for sizes in itertools.product(*outer.values()):
        base = fill_groups(teacher, teacher.resized(**dict(zip(outer, sizes))), listed)
        for width in _solved_widths(base, teacher, recipe, grid, survey.reasons):
            _look_at(base.resized(**{SOLVED.size.field: width}), teacher, recipe, survey)
    left_out = _left_out(survey.reasons, survey.possible)
    _refuse_bad_survey(survey, search, left_out)
    return survey.fitting, left_out


def _look_at(arch: Arch, teacher: Arch, recipe: Recipe, survey: _Survey) -> None:
    """Add one combination of sizes to the survey."""
    if arch == teacher:
        return
    why_not = _why_not(arch, teacher, recipe)
    if why_not:
        survey.reasons[why_not] += 1
        return
    assert recipe.search is not None
    survey.possible += 1
    if recipe.search.budget[0] == "latency_ms":  # measured later
        survey.fitting.append(arch)
        return
    least, most = recipe.search.bounds
    used = _used(arch, recipe)
    survey.used.append(used)
    if least <= used <= most:
        survey.fitting.append(arch)


def _used(arch: Arch, recipe: Recipe) -> float:
    """What an architecture uses of a budget of parameters or memory."""
    search = recipe.search
    assert search is not None
    if search.budget[0] == "parameters":
        return arch.num_parameters()
    context = search.context or recipe.data.sequence_length
    return inference_bytes(arch, recipe.precision, search.batch_size, context) / 2**30


def _solved_widths(
    base: Arch, teacher: Arch, recipe: Recipe, grid: dict[str, list[int]], reasons: Counter[str]
) -> list[int]:
    """Sizes of the solved axis to try with the other sizes of `base`, falling."""
    search, name = recipe.search, SOLVED.size.field
    assert search is not None
    largest = getattr(teacher, name)
    step = size_step(SOLVED, recipe.target.align, recipe.parallel.tp)
    if search.mlp_expansion:
        nearest = {round(e * base.hidden_size / step) * step for e in search.mlp_expansion}
        widths = sorted((width for width in nearest if 0 < width <= largest), reverse=True)
        why = f"mlp_expansion x hidden_size is 0 or above the teacher's {name} {largest}"
        reasons[why] += len(nearest) - len(widths)
        return widths
    if getattr(search, name):
        return grid[name]
    budget, wanted = search.budget

    def used(width: int) -> float:
        return _used(base.resized(**{name: width}), recipe)

    # The largest inside the budget; of parameters, which may be exceeded, the nearest.
    widths = steps_down(largest, step)
    inside = min(bisect_left(widths, -wanted, key=lambda width: -used(width)), len(widths) - 1)
    first = max(0, inside - 1) if budget == "parameters" else inside
    return [min(widths[first : inside + 1], key=lambda width: abs(used(width) - wanted))]


def _refuse_bad_survey(survey: _Survey, search: SearchConfig, left_out: str) -> None:
    """InputError for a search without a candidate, or with too many."""
    (budget, wanted), (least, most) = search.budget, search.bounds
    if not survey.fitting and not survey.used:
        why = left_out or "the only one is the teacher; list smaller sizes"
        raise InputError(f"no candidate of search is possible, whatever the budget: {why}")
    if not survey.fitting:
        near = min(survey.used, key=lambda value: abs(value - wanted))
        other = f" ({left_out})" if left_out else ""
        raise InputError(
            f"no candidate of search has {least:,.4g} to {most:,.4g} ({budget}); "
            f"the nearest one has {near:,.4g}: change the budget, or list other sizes{other}"
        )
    if len(survey.fitting) > search.max_candidates:
        raise InputError(
            f"search has {len(survey.fitting)} candidates, search.max_candidates is "
            f"{search.max_candidates}: list fewer sizes, or raise it"
        )


def _why_not(arch: Arch, teacher: Arch, recipe: Recipe) -> str:
    """What stops a candidate, in words that many share, so that they can be counted.

    Empty: it can be cut, run and exported.
    """
    p, depth = recipe.parallel, recipe.depth
    free = teacher.num_layers - depth.protect_first - depth.protect_last
    stages = p.pp * (p.vpp or 1)
    if stages > arch.num_layers:
        return f"num_layers below the {stages} pipeline stages (pp x vpp)"
    if teacher.num_layers - arch.num_layers > free:
        return (
            f"depth.protect_first and protect_last leave {max(0, free)} layers that may go; "
            "protect fewer, or keep more layers"
        )
    for axis in AXES.values():
        if axis.group is not None:
            units, groups = getattr(arch, axis.size.field), getattr(arch, axis.group.field)
            if units % groups:
                return f"{axis.size.field} {units} is no multiple of {axis.group.field} {groups}"
            if crowded := crowded_groups(axis, teacher, arch):
                return crowded
    if problems := layout_problems(arch, p.tp):
        return problems[0]
    if recipe.distill.fp8 and fp8_problems(arch, p.tp, p.tokens_of_sample(recipe.data.sequence_length)):
        return (
            f"distill.fp8 wants multiples of {FP8_MULTIPLE} of all widths on a rank; "
            f"target.align: {FP8_MULTIPLE} keeps to them"
        )
    if unexportable := export_problems(arch, recipe.export.family):
        return unexportable[0].reason
    return ""


def _left_out(reasons: Counter[str], possible: int) -> str:
    """The commonest reasons, counted."""
    count, common = sum(reasons.values()), reasons.most_common(3)
    shown_reasons = [f"{why} ({n:,})" for why, n in common if n]
    rest = count - sum(n for _, n in common)
    if rest:
        shown_reasons.append(f"others ({rest:,})")
    if not shown_reasons:
        return ""
    return f"{count:,} of {count + possible:,} combinations left out: {', '.join(shown_reasons)}"


def _grid(teacher: Arch, search: SearchConfig, align: int, tp: int) -> dict[str, list[int]]:
    """Field of the architecture -> sizes to try, falling; InputError if one cannot be cut."""
    fewest_layers = math.ceil(0.9 * teacher.num_layers)
    defaults = {name: [getattr(teacher, name)] for name in SIZE_FIELDS}
    defaults["num_layers"] = list(range(teacher.num_layers, fewest_layers - 1, -1))
    steps = dict.fromkeys(SIZE_FIELDS, 1)
    for axis in AXES.values():
        steps[axis.size.field] = size_step(axis, align, tp)
    for axis in STEPPED:
        name = axis.size.field
        largest = getattr(teacher, name)
        sixteenth = math.ceil(largest / 16 / steps[name]) * steps[name]
        defaults[name] = [size for size in steps_down(largest, sixteenth) if 2 * size >= largest]
    problems, grid = [], {}
    for name, default in defaults.items():
        grid[name] = sorted(set(getattr(search, name, [])), reverse=True) or default
        largest = getattr(teacher, name)
        wrong = [n for n in grid[name] if not 0 < n <= largest or (n != largest and n % steps[name])]
        if wrong:
            problems.append(
                f"search.{name} {', '.join(map(str, wrong))}: give multiples of {steps[name]} "
                f"up to the teacher's {largest}"
            )
    refuse("these sizes cannot be cut:", problems)
    return grid
