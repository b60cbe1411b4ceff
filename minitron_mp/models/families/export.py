"""Checks whether transformers loads a model, and as which family it can be written."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minitron_mp.errors import refuse
from minitron_mp.models.arch import Arch
from minitron_mp.models.families import FAMILIES
from minitron_mp.models.families.family import Family


@dataclass(frozen=True)
class ExportProblem:
    """A reason why transformers does not load a model.

    text: the reason with the sizes of the model, and the remedy. reason: the same without the
    sizes, so that a search can count equal reasons.
    """

    text: str
    reason: str


def hidden_divisor(arch: Arch, family: str | None = None) -> int:
    """Return the number that hidden_size must be a multiple of, for transformers to load the model.

    family: as in export_problems().
    """
    rules = FAMILIES.get(family or arch.family)
    return arch.num_attention_heads if rules is not None and rules.heads_divide_hidden else 1


def near_multiples(size: int, step: int, largest: int | None = None) -> list[int]:
    """Return the multiples of step directly below and above size that are at least 1 and at most largest.

    size is not a multiple of step. largest: no limit if None.
    """
    below = size // step * step
    return [n for n in (below, below + step) if n > 0 and (largest is None or n <= largest)]


def export_problems(arch: Arch, family: str | None = None, align: int = 1) -> list[ExportProblem]:
    """Return the reasons why transformers does not load a model of these sizes.

    family: family that the model is written as. Default: the family of arch. The result is empty
    for a family that is not in FAMILIES, because Megatron-Bridge exports those. align: the text
    suggests only multiples of it.
    """
    rules = FAMILIES.get(family or arch.family)
    if rules is None:
        return []
    if not arch.is_uniform and not rules.layers_may_differ:
        text = (
            f"the layers differ in size, and {rules.transformers_class} has one size for all layers; "
            "give one size for all layers, or use the sharded checkpoint"
        )
        return [ExportProblem(text=text, reason=text)]
    if arch.hidden_size % hidden_divisor(arch, family) == 0:
        return []
    return [_head_problem(arch, rules, align)]


def _head_problem(arch: Arch, rules: Family, align: int) -> ExportProblem:
    """Return the problem that num_attention_heads does not divide hidden_size."""
    hidden_size, heads = arch.hidden_size, arch.num_attention_heads
    cause = f"is not a multiple of num_attention_heads {heads}, as transformers requires for {rules.title}"
    sizes = " or ".join(map(str, near_multiples(hidden_size, math.lcm(heads, align))))
    others = [
        name
        for name, conversion in rules.exports_as.items()
        if not FAMILIES[name].heads_divide_hidden and not conversion.problems(arch)
    ]
    other_family = f"set export.family: {' or '.join(others)} (same computation)" if others else ""
    return ExportProblem(
        text=f"hidden_size {hidden_size} {cause}; use {sizes}" + (f", or {other_family}" if others else ""),
        reason=f"hidden_size {cause}" + (f"; {other_family}" if others else ""),
    )


def reader_rows(arch: Arch) -> list[tuple[str, str]]:
    """Return (reader, reason why it does not accept the exported model, or "") for each known reader.

    arch: with the family that it is exported as. [] for a family that is not in FAMILIES, and for
    layers of different sizes.
    """
    rules = FAMILIES.get(arch.family)
    if rules is None or not arch.is_uniform:
        return []
    return [(reader, rule(arch)) for reader, rule in rules.readers.items()]


def reader_lines(arch: Arch) -> list[str]:
    """Return sentences about which programs read the exported model, and why others do not."""
    rows = reader_rows(arch)
    accepting = [reader for reader, reason in rows if not reason]
    lines = [f"the exported folder works with {', '.join(accepting)}"] if accepting else []
    for reason in dict.fromkeys(reason for _, reason in rows if reason):
        rejecting = ", ".join(reader for reader, given in rows if given == reason)
        lines.append(f"the exported folder does not work with {rejecting}: {reason}")
    return lines


def exportable_arch(student: Arch, family: str | None, align: int = 1) -> Arch:
    """Return the architecture with the family that it is exported as.

    family: export.family of the recipe. align: target.align, if the sizes can still be changed.
    InputError when transformers would not load the model.
    """
    if family and family != student.family:
        refuse("the student cannot be exported:", _family_problems(student, family))
    exported = student.model_copy(update={"family": family or student.family})
    problems = export_problems(exported, align=align)
    refuse("the student cannot be exported:", [problem.text for problem in problems])
    return exported


def _family_problems(student: Arch, family: str) -> list[str]:
    """Return the reasons why a model cannot be written as this family."""
    student_family = FAMILIES.get(student.family)
    conversions = student_family.exports_as if student_family else {}
    if family not in conversions:
        possible = " or ".join([student.family, *conversions])
        remedy = "set one of these, or drop export.family" if conversions else "drop export.family"
        return [
            f"export.family {family}: a model of the family {student.family} can be written only as "
            f"{possible}; {remedy}"
        ]
    return [f"export.family {family}: {problem}" for problem in conversions[family].problems(student)]
