"""Which models transformers loads, and as which family."""

from __future__ import annotations

from minitron_mp.errors import refuse
from minitron_mp.models.arch import Arch
from minitron_mp.models.families import FAMILIES
from minitron_mp.models.families.family import ExportProblem


def export_problems(arch: Arch, family: str | None = None) -> list[ExportProblem]:
    """Return the reasons why transformers does not load a model of these sizes.

    family: written as this family; default: its own. Empty for a family that is not in FAMILIES,
    because Megatron-Bridge exports those.
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


def exportable_arch(student: Arch, family: str | None) -> Arch:
    """Return the architecture under the family that it is exported as.

    family: export.family of the recipe. InputError when transformers would not load the model.
    """
    if family and family != student.family:
        refuse("the student cannot be exported:", _family_problems(student, family))
    exported = student.resized(family=family or student.family)
    refuse("the student cannot be exported:", [problem.text for problem in export_problems(exported)])
    return exported


def _family_problems(student: Arch, family: str) -> list[str]:
    """Return the reasons why a model cannot be written as another family."""
    own = FAMILIES.get(student.family)
    others = own.exports_as if own else {}
    if family not in others:
        possible = " or ".join([student.family, *others])
        return [
            f"export.family {family}: a model of the family {student.family} is written as {possible} only"
        ]
    return [f"export.family {family}: {problem}" for problem in others[family].problems(student)]
