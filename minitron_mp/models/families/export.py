"""Checks whether transformers loads a model, and as which family it can be written."""

from __future__ import annotations

from minitron_mp.errors import refuse
from minitron_mp.models.arch import Arch
from minitron_mp.models.families import FAMILIES
from minitron_mp.models.families.family import ExportProblem


def export_problems(arch: Arch, family: str | None = None) -> list[ExportProblem]:
    """Return the reasons why transformers does not load a model of these sizes.

    family: family that the model is written as. Default: the family of arch. The result is empty
    for a family that is not in FAMILIES, because Megatron-Bridge exports those.
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
    return rules.export_problems(arch)


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


def exportable_arch(student: Arch, family: str | None) -> Arch:
    """Return the architecture with the family that it is exported as.

    family: export.family of the recipe. InputError when transformers would not load the model.
    """
    if family and family != student.family:
        refuse("the student cannot be exported:", _family_problems(student, family))
    exported = student.model_copy(update={"family": family or student.family})
    refuse("the student cannot be exported:", [problem.text for problem in export_problems(exported)])
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
