"""Estimates of the further rounds of a recipe, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minitron_mp.config.recipe import Recipe
from minitron_mp.models.arch import Arch
from minitron_mp.planning.case import PlanningCase
from minitron_mp.planning.estimate import Estimate
from minitron_mp.planning.layouts import fits, layout_problem
from minitron_mp.planning.memory import GIB
from minitron_mp.planning.search import fastest_layout
from minitron_mp.planning.step_time import estimate_distillation
from minitron_mp.planning.tables import layout_text
from minitron_mp.planning.times import Times
from minitron_mp.pruning.search_space import possible_students

ROUNDS_HEADER = (
    "round",
    "student",
    "tokens per sample",
    "layout",
    "s per step",
    "GiB",
    "steps",
    "hours",
    "GPU-hours",
    "cost",
)


@dataclass(frozen=True)
class Models:
    """Architectures of a round."""

    base: Arch
    """The model that is pruned."""
    teacher: Arch
    """The model that the student is distilled from."""
    student: Arch


@dataclass(frozen=True)
class RoundEstimate:
    """The distillation of one round. estimate: None if no layout fits on these GPUs."""

    name: str
    student: Arch
    estimate: Estimate | None
    own_layout: bool
    """Whether the estimate is that of the round's layout, not of the fastest one."""


def largest_student(recipe: Recipe, base: Arch) -> Arch:
    """Return the student of a round; with a search, the largest candidate."""
    return max(possible_students(recipe, base), key=lambda arch: arch.num_parameters())


def estimate_rounds(recipe: Recipe, models: Models, world: int, times: Times) -> list[RoundEstimate]:
    """Return an estimate of each round, in its layout if that is possible, else in the fastest.

    models: of the first round.
    """
    rounds, base = [], models.base
    for each in recipe.all_rounds if recipe.rounds else []:
        base = largest_student(each, base)
        case = PlanningCase(base, models.teacher, each, world)
        own = None if layout_problem(case, times) else estimate_distillation(case, times)
        is_possible = own is not None and fits(own, times)
        estimate = own if is_possible else fastest_layout(case, times)
        rounds.append(RoundEstimate(each.round_name, base, estimate, is_possible))
    return rounds


def round_rows(rounds: Sequence[RoundEstimate], price: float | None) -> list[tuple[str, ...]]:
    """Return rows under ROUNDS_HEADER, with a sum. price: of a GPU-hour."""
    rows = [_row(each, price) for each in rounds]
    estimates = [each.estimate for each in rounds if each.estimate]
    hours = sum(estimate.hours for estimate in estimates)
    gpu_hours = sum(estimate.gpu_hours for estimate in estimates)
    total = ("sum", *[""] * 6, f"{hours:,.1f}", f"{gpu_hours:,.0f}", _cost(gpu_hours, price))
    return [*rows, total]


def _row(each: RoundEstimate, price: float | None) -> tuple[str, ...]:
    parameters = f"{each.student.num_parameters():,}"
    estimate = each.estimate
    if estimate is None:
        return (each.name, parameters, "", "nothing fits", *[""] * 6)
    return (
        each.name,
        parameters,
        f"{estimate.recipe.data.sequence_length:,}",
        layout_text(estimate) + ("" if each.own_layout else " (the recipe's is impossible)"),
        f"{estimate.step_s:.3f}",
        f"{estimate.needed_bytes / GIB:.1f}",
        f"{estimate.recipe.distill.steps:,}",
        f"{estimate.hours:,.1f}",
        f"{estimate.gpu_hours:,.0f}",
        _cost(estimate.gpu_hours, price),
    )


def _cost(gpu_hours: float, price: float | None) -> str:
    return "" if price is None else f"{gpu_hours * price:,.0f}"
