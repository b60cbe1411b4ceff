"""The mistakes in a recipe as sentences, from the errors of pydantic."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any

from minitron_mp.config.base import Section

if typing.TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def section_type(annotation: Any) -> type[Section] | None:
    """Return the section in the type of a field: CorrectionConfig for `CorrectionConfig | None`."""
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


_RULES = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be keys and values",
    "finite_number": "must be finite",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "int_from_float": "must be an integer",
    "int_parsing": "must be an integer",
    "int_type": "must be an integer",
    "invalid_key": "keys must be text",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "model_type": "must be a section with keys and values",
    "path_or_paths": "must be a path or a list of paths",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "string_unicode": "must be UTF-8 text",
    "too_short": "must have {min_length} or more values",
    "tuple_type": "must be a list",
}
"""Type of a pydantic error -> the rule in plain English. Other errors keep pydantic's text."""


def sentences(errors: Sequence[ErrorDetails], recipe: type[Section]) -> list[str]:
    """Return validation errors as sentences: one for each line of a validator of this package.

    The rules of a field of two types are joined: "must be 'dynamic' or a number". recipe: the class
    of the outermost section.
    """
    rules: dict[tuple[str, str], list[str]] = {}  # (start, end of a sentence) -> rules between them
    for error in errors:
        key = _key(error["loc"], recipe)
        if error["type"] == "extra_forbidden":
            rules[f"unknown key {key}; {_suggestion(error['loc'], recipe)}", ""] = []
        elif error["type"] == "missing":
            rules[f"{key} is missing; add it", ""] = []
        elif error["type"] == "value_error":
            for row in error["msg"].removeprefix("Value error, ").splitlines():
                rules[f"{key}: {row}" if key else row, ""] = []
        else:
            rule = _RULES.get(error["type"], error["msg"]).format(**error.get("ctx", {}))
            subject = "its key " if error["loc"][-1:] == ("[key]",) else ""
            others = rules.setdefault((f"{key}: {subject}", f", given {_given(error['input'])}"), [])
            others.append(rule.removeprefix("must be ") if others else rule)
    return [start + " or ".join(between) + end for (start, end), between in rules.items()]


def _given(value: object) -> str:
    return "nothing (an empty value and ~ are null in YAML)" if value is None else repr(value)


def _key(location: tuple[int | str, ...], section: type[Section]) -> str:
    """Return the dotted key of an error, without the parts that pydantic adds.

    They are "[key]" for the key of a dictionary, and the kind of value that it tried: float.
    """
    parts = [part for part in location if part != "[key]"]
    for index, part in enumerate(parts):
        field = section.model_fields.get(str(part))
        inner = field and section_type(field.annotation)
        if inner:
            section = inner
            continue
        if field and len([kind for kind in typing.get_args(field.annotation) if kind is not type(None)]) > 1:
            is_union = typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
            del parts[index + 1 : index + 2 if is_union else index + 1]
        break
    return ".".join(map(str, parts))


def _suggestion(location: tuple[int | str, ...], recipe: type[Section]) -> str:
    """Return what a user may have meant by an unknown key."""
    section = recipe
    name = str(location[-1])
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        section = (field and section_type(field.annotation)) or section
    nearest = difflib.get_close_matches(name, section.model_fields, 1, 0.7)
    if nearest:
        return f"did you mean {nearest[0]}?"
    elsewhere = [key for key in _keys(recipe) if key.split(".")[-1] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"use one of {', '.join(section.model_fields)}"


def _keys(section: type[Section], prefix: str = "") -> list[str]:
    """Return the dotted keys of a section and of the sections inside it."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = section_type(field.annotation)
        if inner is not None:
            keys += _keys(inner, f"{prefix}{name}.")
    return keys
