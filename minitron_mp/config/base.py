"""Section, the base class of all sections of a recipe, and types of fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic.config import JsonDict

NOT_IN_RESULT: JsonDict = {"result": False}
"""Mark of a field that does not change the result of a stage.

Write it as Field(default=1, json_schema_extra=NOT_IN_RESULT). Every field without this mark is part
of the fingerprint of its stage.
"""

IN_RESULT_IF_CHANGED: JsonDict = {"result": "if changed"}
"""Mark of a field that is part of the fingerprint only if it differs from its default.

Use it for a new field, so that artifacts from before the field stay valid.
"""


def _with_suffix(value: object) -> object:
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    if isinstance(value, str) and value[-1:].upper() in units:
        try:
            return float(value[:-1]) * units[value[-1].upper()]
        except ValueError:
            raise ValueError(f"{value!r} is not a number of parameters; write 8.4e9, 8.4B or 102M") from None
    return value


Count = Annotated[float, BeforeValidator(_with_suffix)]
"""A number, or a number with the suffix K, M or B."""


class Section(BaseModel):
    """A frozen part of a recipe. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_sections(cls, values: object) -> object:
        """Read a section without keys as its defaults. In YAML it is null."""
        if not isinstance(values, dict):
            return values
        sections = {name for name, field in cls.model_fields.items() if isinstance(field.default, Section)}
        return {key: value for key, value in values.items() if value is not None or key not in sections}

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that change a result: all fields except marked and empty ones."""
        fields = type(self).model_fields
        marked = {name for name, field in fields.items() if field.json_schema_extra == NOT_IN_RESULT}
        for name, field in fields.items():
            is_new = field.json_schema_extra == IN_RESULT_IF_CHANGED
            if is_new and getattr(self, name) == field.default:
                marked.add(name)
        return self.model_dump(exclude=marked, exclude_none=True)

    def changed(self, names: list[str]) -> list[str]:
        """Return the names of those fields among `names` that differ from their default."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]
