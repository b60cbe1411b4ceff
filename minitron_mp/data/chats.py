"""Chats of records: lists of messages, which are checked and kept as JSON text.

The JSON text has the fields "messages" and, for a chat with tools, "tools". A chat template turns it
into text (chat_encoder.py).
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from minitron_mp.data.record_errors import RENAME_KEYS, Place, kind_of
from minitron_mp.data.record_fields import TOOLS, Fields, field_of
from minitron_mp.errors import InputError


def chat_of(record: object, fields: Fields, place: Place) -> str | None:
    """Return the chat of a record as JSON text; None if it has no chat.

    InputError with the place if the chat or its tools are malformed. As in transformers, keys of a
    message that are null are left out. In tables all null keys are left out, because each object of
    a column has the keys of all others.
    """
    if fields.chat is None:
        return None
    try:
        messages = field_of(record, fields.chat)
    except KeyError:
        return None
    if messages is None:
        return None
    problem = _messages_problem(messages)
    if problem:
        raise InputError(f'{place} has {problem} in the field "{fields.chat}"; {_advice(problem)}')
    assert isinstance(record, dict)
    if place.is_row:
        messages = _without_null(messages)
    messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
    chat = {"messages": messages}
    tools = _tools_of(record.get(TOOLS), place)
    if tools:
        chat[TOOLS] = tools
    return json.dumps(chat, ensure_ascii=False, default=str)


def _messages_problem(messages: object) -> str | None:
    """Return what is wrong with a list of messages, such as "a number, not a list of messages"."""
    if not isinstance(messages, list):
        return f"{kind_of(messages)}, not a list of messages,"
    if not messages:
        return "no messages"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"{kind_of(message)} as message {number}, not an object with role and content,"
        if "role" not in message and message.keys() >= {"from", "value"}:
            return f'"from" and "value" in message {number}, not "role" and "content",'
        for name in ("role", "content"):
            value = message.get(name)
            if isinstance(value, str) or (name == "content" and value is None and message.get("tool_calls")):
                continue
            given = f"{kind_of(value)} as" if name in message else "no"
            return f'{given} "{name}" of message {number}, which must be a string,'
    return None


def _advice(problem: str) -> str:
    if '"from" and "value"' in problem:
        return RENAME_KEYS
    if problem.startswith('a list as "content"'):
        return "join the texts of its parts into one string"
    return "correct or delete it, or set data.chat_field"


def _tools_of(tools: Any, place: Place) -> list[Any]:
    """Return the tools of a chat; [] if it has none. Some tables have them as JSON text."""
    if isinstance(tools, str):
        with suppress(ValueError):
            tools = json.loads(tools) if tools.strip() else None
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(
            f'{place} has {kind_of(tools)} in the field "{TOOLS}", not a list of JSON schemas; correct or '
            "delete it"
        )
    return _without_null(tools) if place.is_row else tools


def _without_null(value: Any) -> Any:
    """Return a JSON value without the keys that are null."""
    if isinstance(value, dict):
        return {name: _without_null(inner) for name, inner in value.items() if inner is not None}
    return [_without_null(inner) for inner in value] if isinstance(value, list) else value
