"""The student's architecture, from the sizes of a target or the largest sizes within a budget."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Collection

from minitron_mp.config.pruning import DEPTH, TargetConfig
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch, layout_problems
from minitron_mp.models.axes import AXES, HIDDEN, SOLVED, STEPPED, Axis
from minitron_mp.models.families.export import export_problems, hidden_divisor, near_multiples

WIDTH_FIELDS = tuple(size.field for axis in AXES.values() for size in axis.sizes)
"""Names of the width sizes that a target or a search may set."""

SIZE_FIELDS = ("num_layers", *WIDTH_FIELDS)


def resolve_target(teacher: Arch, target: TargetConfig, tp: int = 1, family: str | None = None) -> Arch:
    """Return the student's architecture; InputError with all problems and the nearest valid sizes."""
    if target.max_parameters is not None:
        student = _largest(teacher, target, tp, target.max_parameters, family)
    elif target.keep is not None:
        student = _largest(teacher, target, tp, target.keep * teacher.num_parameters(), family)
    else:
        given = {name: size for name in SIZE_FIELDS if (size := getattr(target, name, None))}
        if target.drop_layers:
            given["num_layers"] = teacher.num_layers - len(target.drop_layers)
        student = fill_groups(teacher, teacher.resized(**given), given)
    refuse("this target is not possible:", _target_problems(teacher, student, target, tp, family))
    return student


def fill_groups(teacher: Arch, student: Arch, given: Collection[str]) -> Arch:
    """Return the student with the teacher's units per group, on each axis whose size is not given."""
    for axis in AXES.values():
        if axis.group is not None and axis.size.field not in given:
            size = getattr(student, axis.group.field) * per_group(axis, teacher)
            student = student.resized(**{axis.size.field: size})
    return student


def per_group(axis: Axis, arch: Arch) -> int:
    """Return the number of units in a group, of a model whose layers have equal sizes."""
    assert axis.group is not None
    return getattr(arch, axis.size.field) // getattr(arch, axis.group.field)


def size_step(axis: Axis, align: int, tp: int) -> int:
    """Return the number that a smaller size of an axis without groups must be a multiple of."""
    if not axis.aligned:
        return 1
    return align * tp if axis.split_over_tp else align


def crowded_groups(axis: Axis, teacher: Arch, student: Arch) -> str:
    """Return an error text if the student has more units in a group than the teacher, else ""."""
    if axis.group is None or per_group(axis, student) <= per_group(axis, teacher):
        return ""
    units, groups = getattr(student, axis.size.field), getattr(student, axis.group.field)
    return (
        f"{axis.size.field} {units} in {groups} {axis.group.units} is more per group than "
        f"the teacher's {per_group(axis, teacher)}"
    )


def _target_problems(
    teacher: Arch, student: Arch, target: TargetConfig, tp: int, family: str | None
) -> list[str]:
    problems = [
        f"drop_layers names layer {n}, the model has 0 to {teacher.num_layers - 1}; name those only"
        for n in target.drop_layers or []
        if n >= teacher.num_layers
    ]
    if target.drop_layers and len(target.drop_layers) >= teacher.num_layers:
        problems.append("drop_layers names every layer; name fewer")
    problems += _size_problems(teacher, student, "num_layers", 1, "")
    for axis in AXES.values():
        problems += _axis_problems(axis, teacher, student, target.align, tp, family)
    if problems:
        return problems
    for axis in AXES.values():
        if crowded := crowded_groups(axis, teacher, student):
            assert axis.group is not None
            most = getattr(student, axis.group.field) * per_group(axis, teacher)
            problems.append(f"{crowded}; at most {most}")
        elif target.merge_heads and axis.merges and per_group(axis, student) == per_group(axis, teacher):
            assert axis.group is not None
            problems.append(
                f"merge_heads: each kept {axis.group.unit} keeps its {per_group(axis, teacher)} "
                f"{axis.size.units}, so there is nothing to merge; remove merge_heads, "
                f"or give fewer {axis.size.field}"
            )
    return problems or layout_problems(student, tp)


def _axis_problems(
    axis: Axis, teacher: Arch, student: Arch, align: int, tp: int, family: str | None
) -> list[str]:
    """Return the problems of one axis: sizes that are too large or not a valid multiple."""
    if axis.group is None:
        step = size_step(axis, align, tp)
        why = f"target.align {align} x parallel.tp {tp}" if step != align else "target.align"
        divisor = hidden_divisor(student, family) if axis is HIDDEN else 1
        return _size_problems(teacher, student, axis.size.field, step, why, divisor=divisor)
    problems = _size_problems(teacher, student, axis.group.field, tp, "parallel.tp")
    groups = getattr(student, axis.group.field)
    hint = f", or cut {axis.group.field} too"
    why = axis.group.field
    return problems + _size_problems(teacher, student, axis.size.field, groups, why, hint)


def _size_problems(
    teacher: Arch, student: Arch, field: str, step: int, why: str, hint: str = "", divisor: int = 1
) -> list[str]:
    """Return a problem if a size is larger than the teacher's, or smaller and not a multiple of step.

    divisor: for hidden_size, hidden_divisor(). The suggested sizes are multiples of it, too.
    """
    before, after = getattr(teacher, field), getattr(student, field)
    if after > before:
        return [f"{field} {after} is larger than the teacher's {before}; give at most that"]
    if after == before or after % step == 0:
        return []
    both = math.lcm(step, divisor)
    also = "" if both == step else f" (also a multiple of num_attention_heads {divisor}, for the export)"
    suggestion = " or ".join(map(str, near_multiples(after, both, before) or [before])) + also + hint
    return [f"{field} {after} is not a multiple of {step} ({why}); use {suggestion}"]


def _largest(teacher: Arch, target: TargetConfig, tp: int, budget: float, family: str | None) -> Arch:
    """Return the deepest, or the most evenly scaled, student of at most `budget` parameters.

    All widths can be exported as the family (default: the teacher's).
    """
    if budget > teacher.num_parameters():
        raise InputError(
            f"target.max_parameters {budget:,.0f} is more than the teacher's {teacher.num_parameters():,}, "
            "so nothing would be cut; give a smaller number"
        )
    all_widths = [axis.name for axis in (*STEPPED, SOLVED)]
    axes = target.axes or all_widths
    widths = ", ".join(all_widths)
    unknown = [name for name in axes if name not in (*all_widths, DEPTH)]
    if unknown:
        raise InputError(f"target.axes {', '.join(unknown)}: unknown; give some of {widths}, or {DEPTH}")
    if set(axes) == {DEPTH}:
        candidates = (teacher.resized(num_layers=n) for n in range(teacher.num_layers, 0, -1))
        student = next((c for c in candidates if c.num_parameters() <= budget), None)
    elif DEPTH not in axes:
        student = _most_even_width(teacher, axes, target.align, tp, budget, family or teacher.family)
    else:
        raise InputError(
            f"target.axes {axes} mixes width and depth; "
            f"give some of {widths}, or {DEPTH}, or explicit sizes for both"
        )
    if student is None:
        raise InputError(
            f"no student along {axes} has at most {budget:,.0f} parameters; the embeddings alone may "
            f"be larger: reduce all of {widths}, or give a larger budget"
        )
    return student


def _most_even_width(
    teacher: Arch, axes: Collection[str], align: int, tp: int, budget: float, family: str
) -> Arch | None:
    """Return the student whose axes are scaled most evenly, or None if all are too large.

    Of two equally even students it is the larger one.
    """

    def sizes_of(axis: Axis) -> list[int]:
        size = getattr(teacher, axis.size.field)
        return steps_down(size, size_step(axis, align, tp)) if axis.name in axes else [size]

    solved = SOLVED.size.field
    solved_sizes = sizes_of(SOLVED)
    fitting = []
    for chosen in itertools.product(*(sizes_of(axis) for axis in STEPPED)):
        base = teacher.resized(**{axis.size.field: size for axis, size in zip(STEPPED, chosen)})

        def negative_count(size: int, base: Arch = base) -> int:
            return -base.resized(**{solved: size}).num_parameters()

        if not export_problems(base, family):
            first = bisect_left(solved_sizes, -budget, key=negative_count)
            fitting += [base.resized(**{solved: size}) for size in solved_sizes[first : first + 1]]

    def unevenness(student: Arch) -> float:
        fields = [axis.size.field for axis in (*STEPPED, SOLVED)]
        shares = [getattr(student, field) / getattr(teacher, field) for field in fields]
        return max(shares) - min(shares)

    return min(fitting, key=lambda s: (unevenness(s), -s.num_parameters()), default=None)


def steps_down(size: int, step: int) -> list[int]:
    """Return size and the multiples of step below it, in descending order."""
    return [size, *range((size - 1) // step * step, 0, -step)]
