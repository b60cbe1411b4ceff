"""Fields of a record that have its text, or its chat."""

from __future__ import annotations

from typing import Any, NamedTuple

TOOLS = "tools"
"""Field of a record with the tools of its chat."""


class Fields(NamedTuple):
    """Names of the fields that are read. a.b is the field b of the object a."""

    text: str
    chat: str | None = None
    """Field of a list of messages. A record that has it is a chat. None: no record is a chat."""

    def __str__(self) -> str:
        text = f'field "{self.text}"'
        return text if self.chat is None else f'chat in the field "{self.chat}" and no {text}'


def field_of(record: object, field: str) -> Any:
    """Return a field; a.b is the key "a.b", or b in the object a. KeyError if there is none."""
    if not isinstance(record, dict):
        raise KeyError(field)
    if field in record:
        return record[field]
    first, _, rest = field.partition(".")
    if not rest:
        raise KeyError(field)
    return field_of(record[first], rest)


def columns_of(names: list[str], fields: Fields) -> list[str]:
    """Return the columns of a table that are read; [] if it has neither text nor chats.

    names: of all its columns.
    """
    wanted = [field for field in (fields.text, fields.chat) if field is not None]
    columns = [field if field in names else field.partition(".")[0] for field in wanted]
    found = [name for name in dict.fromkeys(columns) if name in names]
    if found and fields.chat is not None and TOOLS in names and TOOLS not in found:
        found.append(TOOLS)
    return found
