"""Section, the base class of all sections of a recipe, and types of fields."""

from __future__ import annotations

import re
import typing
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

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


NUMBER = re.compile(
    r"[-+]?(?P<digits>\d[\d_]*)|(?P<base>0x[\da-fA-F]+|0o[0-7]+)"
    r"|[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|(?P<special>[-+]?\.(inf|nan))",
    re.ASCII,
)
"""A number of YAML 1.2, with _ between digits: 010 is ten, and 1:30 and `yes` are not numbers."""


def read_number(text: str) -> int | float | str:
    """Return the number of a text, or the text if it is none."""
    match = NUMBER.fullmatch(text.strip())
    try:
        if match is None:
            return text
        if match["digits"]:
            return int(match[0])
        if match["base"]:
            return int(match[0], 0)
        return float(match[0].replace(".", "", 1) if match["special"] else match[0])
    except ValueError:  # 1__0, and integers of thousands of digits
        return text


def _leaves(annotation: Any) -> set[object]:
    """Return the types of the values that a field may contain, inside lists and dictionaries, too."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (None, typing.Literal):
        return {annotation}
    if typing.get_origin(annotation) is dict:
        arguments = arguments[1:]
    if typing.get_origin(annotation) is Annotated:
        arguments = arguments[:1]
    return set().union(*map(_leaves, arguments))


def _with_numbers(value: object, *, is_integer: bool) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("int_type" if is_integer else "float_type", "must be a number")
    if isinstance(value, dict):
        return {key: _with_numbers(part, is_integer=is_integer) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_numbers(part, is_integer=is_integer) for part in value]
    return read_number(value) if isinstance(value, str) else value


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

    @field_validator("*", mode="before")
    @classmethod
    def _read_numbers(cls, value: object, info: ValidationInfo) -> object:
        """Read texts as numbers in fields of numbers, and refuse booleans, which are 0 and 1 in Python.

        A field that also contains texts reads its numbers itself. A field that also contains booleans
        allows them.
        """
        leaves = _leaves(cls.model_fields[str(info.field_name)].annotation)
        if str in leaves or (bool in leaves and isinstance(value, bool)):
            return value
        return _with_numbers(value, is_integer=float not in leaves) if {int, float} & leaves else value

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
