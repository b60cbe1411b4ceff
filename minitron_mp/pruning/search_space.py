"""The candidates of a search: combinations of sizes that fit the budget, layout and export.

This runs on a laptop. The search of 2407.14679 combines numbers of layers and heads, MLP expansions
and embedding sizes within 5 % of a number of parameters.
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
from minitron_mp.models.axes import AXES, SOLVED, STEPPED
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
    """Return how many layers the shallowest possible student of the recipe drops."""
    if recipe.search is not None:
        fewest = min(arch.num_layers for arch in search_candidates(recipe, teacher))
    else:
        family = recipe.export.family
        fewest = resolve_target(teacher, recipe.target, recipe.parallel.tp, family).num_layers
    return teacher.num_layers - fewest


def possible_students(recipe: Recipe, base: Arch) -> list[Arch]:
    """Return the students that a round can make of a model: one, or the candidates of a search.

    A round that does not prune keeps the model.
    """
    if not recipe.prunes:
        return [base]
    if recipe.search is not None:
        return search_candidates(recipe, base)
    return [resolve_target(base, recipe.target, recipe.parallel.tp, recipe.export.family)]


def search_candidates(recipe: Recipe, teacher: Arch) -> list[Arch]:
    """Return all candidates of a recipe with a section search, as in survey_candidates()."""
    return survey_candidates(recipe, teacher)[0]


@dataclass
class _Survey:
    """The combinations of sizes that were checked so far."""

    fitting: list[Arch] = field(default_factory=list)
    """Candidates inside the budget."""
    used: list[float] = field(default_factory=list)
    """Budget use of each combination that is possible."""
    possible: int = 0
    """Number of combinations that can be cut, run and exported."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Reason -> number of combinations that are not possible for it."""


def survey_candidates(recipe: Recipe, teacher: Arch) -> tuple[list[Arch], str]:
    """Return (candidates in order of size, one line about excluded combinations).

    The line is empty if only the budget excludes combinations. With a latency budget the candidates
    still have to be measured. InputError names the reason if there is no candidate.
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
            _add_combination(base.resized(**{SOLVED.size.field: width}), teacher, recipe, survey)
    left_out = _left_out(survey.reasons, survey.possible)
    _refuse_bad_survey(survey, search, left_out)
    return survey.fitting, left_out


def _add_combination(arch: Arch, teacher: Arch, recipe: Recipe, survey: _Survey) -> None:
    """Add one combination of sizes to the survey."""
    if arch == teacher:
        return
    reason = _obstacle(arch, teacher, recipe)
    if reason:
        survey.reasons[reason] += 1
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
    """Return the parameters, or the memory in GiB, that an architecture uses of the budget."""
    search = recipe.search
    assert search is not None
    if search.budget[0] == "parameters":
        return arch.num_parameters()
    context = search.context or recipe.data.sequence_length
    return inference_bytes(arch, recipe.precision, search.batch_size, context) / 2**30


def _solved_widths(
    base: Arch, teacher: Arch, recipe: Recipe, grid: dict[str, list[int]], reasons: Counter[str]
) -> list[int]:
    """Return the sizes of the solved axis to try with the sizes of `base`, in descending order."""
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
    budget, limit = search.budget

    def used(width: int) -> float:
        return _used(base.resized(**{name: width}), recipe)

    # The largest width inside the budget. A parameter budget may be exceeded: the nearest width.
    widths = steps_down(largest, step)
    inside = min(bisect_left(widths, -limit, key=lambda width: -used(width)), len(widths) - 1)
    first = max(0, inside - 1) if budget == "parameters" else inside
    return [min(widths[first : inside + 1], key=lambda width: abs(used(width) - limit))]


def _refuse_bad_survey(survey: _Survey, search: SearchConfig, left_out: str) -> None:
    """Raise an InputError for a search without candidates, or with too many."""
    (budget, target), (least, most) = search.budget, search.bounds
    if not survey.fitting and not survey.used:
        why = left_out or "the only one is the teacher; list smaller sizes"
        raise InputError(f"no candidate of search is possible, whatever the budget: {why}")
    if not survey.fitting:
        near = min(survey.used, key=lambda value: abs(value - target))
        note = f" ({left_out})" if left_out else ""
        raise InputError(
            f"no candidate of search has {least:,.4g} to {most:,.4g} ({budget}); "
            f"the nearest one has {near:,.4g}: change the budget, or list other sizes{note}"
        )
    if len(survey.fitting) > search.max_candidates:
        raise InputError(
            f"search has {len(survey.fitting)} candidates, search.max_candidates is "
            f"{search.max_candidates}: list fewer sizes, or raise search.max_candidates"
        )


def _obstacle(arch: Arch, teacher: Arch, recipe: Recipe) -> str:
    """Return why a candidate cannot be cut, run and exported, or "" if it can.

    Candidates with the same problem get the same text, so that reasons can be counted.
    """
    p, depth = recipe.parallel, recipe.depth
    free = teacher.num_layers - depth.protect_first - depth.protect_last
    stages = p.pp * (p.vpp or 1)
    if stages > arch.num_layers:
        return f"num_layers below the {stages} pipeline stages (pp x vpp)"
    if teacher.num_layers - arch.num_layers > free:
        return (
            f"depth.protect_first and protect_last leave {max(0, free)} layers to drop from; "
            "protect fewer, or keep more layers"
        )
    for axis in AXES.values():
        if axis.group is not None:
            units, groups = getattr(arch, axis.size.field), getattr(arch, axis.group.field)
            if units % groups:
                return f"{axis.size.field} {units} is not a multiple of {axis.group.field} {groups}"
            if crowded := crowded_groups(axis, teacher, arch):
                return crowded
    if problems := layout_problems(arch, p.tp):
        return problems[0]
    if recipe.distill.fp8 and fp8_problems(arch, p.tp, p.tokens_of_sample(recipe.data.sequence_length)):
        return (
            f"distill.fp8 needs widths that are multiples of {FP8_MULTIPLE} on each rank; "
            f"set target.align: {FP8_MULTIPLE}"
        )
    if unexportable := export_problems(arch, recipe.export.family):
        return unexportable[0].reason
    return ""


def _left_out(reasons: Counter[str], possible: int) -> str:
    """Return one line with the three most common reasons and their counts."""
    count, common = sum(reasons.values()), reasons.most_common(3)
    shown_reasons = [f"{why} ({n:,})" for why, n in common if n]
    rest = count - sum(n for _, n in common)
    if rest:
        shown_reasons.append(f"other reasons ({rest:,})")
    if not shown_reasons:
        return ""
    return f"{count:,} of {count + possible:,} combinations left out: {', '.join(shown_reasons)}"


def _grid(teacher: Arch, search: SearchConfig, align: int, tp: int) -> dict[str, list[int]]:
    """Return field of Arch -> sizes to try, descending; InputError if a size is not valid."""
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
    refuse("these sizes are not possible:", problems)
    return grid
