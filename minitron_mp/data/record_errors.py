"""Errors of records of text files: what is wrong with a record, and what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from minitron_mp.data.record_fields import Fields
from minitron_mp.data.text_files import format_of
from minitron_mp.errors import InputError

SET_FIELD = "set data.text_field to the field with the text"

RENAME_KEYS = 'rename "from" and "value" of its messages to "role" and "content"'


class NoField(InputError):
    """A record has no field with the name of the text's field.

    fields: names of its fields, separated by commas. advice: what to do.
    """

    def __init__(self, message: str, fields: str, advice: str) -> None:
        super().__init__(message)
        self.fields = fields
        self.advice = advice


class NoString(NoField):
    """A record has a value in the field that cannot be text, for example a number."""


class Place(NamedTuple):
    """A record of a file: its line, or its row in a table."""

    path: Path
    number: int

    @property
    def is_row(self) -> bool:
        """Whether it is a row of a table."""
        return format_of(self.path.name) == "table"

    def __str__(self) -> str:
        return f"{self.path} {'row' if self.is_row else 'line'} {self.number}"


def no_field(record: object, wanted: Fields, place: Place | Path) -> NoField:
    """Return the error for a record without the fields, or that is no object."""
    if isinstance(record, dict):
        fields, advice = _fields(record), _field_advice(record)
        message = f"{place} has no {wanted} (its fields: {fields}); {advice}, or delete it"
        return NoField(message, fields, advice)
    advice = _record_advice(record, wanted.text, place)
    message = f"{place} is not a JSON object but {kind_of(record)}; {advice}"
    return (NoString if record is None else NoField)(message, "none", advice)


def no_string(value: object, record: object, field: str, place: Place) -> InputError:
    """Return the error for a value that is no string. A list of strings, objects or lists may be text."""
    item = _first_item(value)
    advice = "correct or delete it, or set data.text_field"
    if _is_chat(value):
        advice = f"it is a chat: {_chat_advice(field, value)}"
    elif isinstance(item, str):
        advice = "join its strings into one, or set data.text_field"
    elif isinstance(item, dict):
        advice = "write each of its objects as a record, or set data.text_field"
    message = f'{place} has {kind_of(value)} in the field "{field}", not a string; {advice}'
    if isinstance(item, (str, dict, list)):
        return InputError(message)
    return NoString(message, _fields(record), SET_FIELD)


def _record_advice(record: object, field: str, place: Place | Path) -> str:
    """Return what to do with a record that is no object."""
    item = _first_item(record)
    if _is_chat(record):
        return "it is a chat: " + _chat_advice("messages", record, '{"messages": [...]}')
    if isinstance(record, str) or isinstance(item, str):
        return f'write each text as {{"{field}": "..."}}'
    if not isinstance(item, (dict, list)):
        return "correct or delete it"
    if isinstance(place, Place) and format_of(place.path.name) == "lines":
        return "name the file .json if it is one array, or write each object on a line"
    return "write its objects without this list around them"


def _field_advice(record: dict[str, Any]) -> str:
    """Return what to do with an object that does not have the field."""
    lists = [(name, value) for name, value in _leaves(record) if isinstance(_first_item(value), dict)]
    for name, value in lists:
        if _is_chat(value):
            return f'"{name}" is a chat: {_chat_advice(name, value)}'
    return SET_FIELD + (f', or write the objects of "{lists[0][0]}" as records' if lists else "")


def _is_chat(value: object) -> bool:
    first = _first_item(value)
    return isinstance(first, dict) and ("role" in first or first.keys() >= {"from", "value"})


def _chat_advice(field: str, chat: object, form: str = "") -> str:
    """Return what to do with a chat. form: how its record must be written, if it is no object."""
    first = _first_item(chat)
    steps = [f"write it as {form}"] if form else []
    if isinstance(first, dict) and "role" not in first:
        steps.append(RENAME_KEYS)
    return ", ".join([*steps, f"set data.chat_field to {field}"])


def _first_item(value: object) -> object:
    return value[0] if isinstance(value, list) and value else None


def _fields(record: object) -> str:
    """Return the names of the first fields of a record."""
    leaves = _leaves(record) if isinstance(record, dict) else iter(())
    return ", ".join(name for name, _ in islice(leaves, 12)) or "none"


def _leaves(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of the fields, with the fields of objects in it as a.b."""
    pending = list(record.items())[::-1]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict) and value:
            pending += [(f"{name}.{inner}", inner_value) for inner, inner_value in value.items()][::-1]
        else:
            yield name, value


def kind_of(value: object) -> str:
    """Return the kind of a JSON value with its article, such as "a list"."""
    if value is None:
        return "null"
    kinds = {dict: "an object", list: "a list", bool: "a truth value", str: "a string"}
    return kinds.get(type(value), "a number")


def not_json(text: str, place: Place, error: Exception) -> str:
    """Return a sentence about text that is not valid JSON."""
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    advice = "correct or delete it"
    if format_of(place.path.name) == "lines" and text.strip() in ("[", "{"):
        advice = "write one record on each line, or name the file .json"
    return f"{place} is not a JSON object: {text[:80].strip()!r} ({reason}); {advice}"
