"""Texts of files of records: JSON lines, JSON arrays, and parquet tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from minitron_mp.data.chats import chat_of
from minitron_mp.data.record_errors import NoString, Place, no_field, no_string, not_json
from minitron_mp.data.record_fields import Fields, columns_of, field_of
from minitron_mp.data.text_files import INSTALL_PYARROW, Format, open_text, reading
from minitron_mp.errors import InputError

MAX_RECORD = 1 << 28
"""Characters of the longest line or record. Its memory is about ten bytes for each."""

MAX_FIRST_RECORD = 1 << 24
"""Characters that are read to find out whether a .json file is text."""

CHECKED_RECORDS = 1000
"""Records of a .json file that are read to find a string in the field of the text."""

CHUNK_CHARACTERS = 1 << 20

LONGEST_WORD = 16
"""Characters of the longest JSON literal or escape sequence, and some more."""

TABLE_ROWS = 64
"""Rows of a parquet file that are read together."""

MAX_INTEGER = 4000
"""Digits of the longest integer. int() refuses longer ones, and float() reads any number of digits."""


def _read_integer(digits: str) -> float:
    return int(digits) if len(digits) <= MAX_INTEGER else float(digits)


DECODER = json.JSONDecoder(parse_int=_read_integer)


class TooLong(InputError):
    """A line or record has too many characters."""


class Record(NamedTuple):
    """The text of a record, and the number of its line (of its row in a table), from 1."""

    line: int
    text: str
    """For a chat its JSON text (chats.py)."""
    is_chat: bool = False


def read_records(path: Path, file_format: Format, fields: Fields) -> Iterator[Record]:
    """Yield the text or the chat of each record of a file.

    InputError names the first line without a string in the field of the text, or with a malformed
    chat.
    """
    if file_format == "table":
        yield from _table_records(path, fields)
        return
    with open_text(path) as file:
        if file_format == "lines":
            yield from _line_records(file, path, fields)
        else:
            for line, value in _json_values(file, path, MAX_RECORD):
                yield _record(value, fields, Place(path, line))


def check_first_record(path: Path, fields: Fields) -> None:
    """Raise InputError if the first record of a .json file has neither a text nor a chat.

    NoField, NoString and TooLong (more than MAX_FIRST_RECORD) mean that the file is not text: many
    .json files are settings. Other errors mean that it may be text which cannot be read. A file is
    not text because of a number, an object or null if no record up to CHECKED_RECORDS has a string.
    """
    problem = None
    with open_text(path) as file:
        for line, value in islice(_json_values(file, path, MAX_FIRST_RECORD), CHECKED_RECORDS):
            try:
                _record(value, fields, Place(path, line))
            except NoString as error:
                problem = problem or error
                continue
            if problem:
                raise InputError(str(problem))
            return
    if problem:
        raise problem


def _record(value: object, fields: Fields, place: Place) -> Record:
    """Return the chat or the text of a record. InputError with the place if it has none."""
    chat = chat_of(value, fields, place)
    if chat is not None:
        return Record(place.number, chat, is_chat=True)
    try:
        text = field_of(value, fields.text)
    except KeyError:
        raise no_field(value, fields, place) from None
    if isinstance(text, bytes):  # of parquet: some programs write text without its type
        text = _decoded(text, fields.text, place)
    if not isinstance(text, str):
        raise no_string(text, value, fields.text, place)
    return Record(place.number, text)


def _decoded(value: bytes, field: str, place: Place) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f'{place} has bytes in the field "{field}" that are not UTF-8: byte 0x{value[error.start]:02x} '
            f"at offset {error.start:,} ({error.reason}); correct or delete it, or set data.text_field"
        ) from None


def read_lines(file: TextIO, path: Path) -> Iterator[str]:
    """Yield the lines of a file of records. InputError for a line of more than MAX_RECORD characters."""
    for number, line in enumerate(iter(partial(file.readline, MAX_RECORD), ""), 1):
        if len(line) >= MAX_RECORD:
            raise TooLong(_too_long(path, number))
        yield line


def _line_records(file: TextIO, path: Path, fields: Fields) -> Iterator[Record]:
    for number, line in enumerate(read_lines(file, path), 1):
        if line.isspace():
            continue
        text = None
        if fields.chat is None:
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                text = json.loads(line)[fields.text]
        if isinstance(text, str):
            yield Record(number, text)
            continue
        place = Place(path, number)
        for value in _values_of_line(line, place):
            yield _record(value, fields, place)


def _values_of_line(line: str, place: Place) -> list[Any]:
    """Return the JSON values of a line that is not one object with the text in its field.

    A line has several values if files were joined without a line end, or with another line end
    than \\n and \\r. It begins with a byte order mark where a file with a mark was appended.
    """
    values = []
    rest = line.strip("\ufeff \t\r\n\x85\u2028\u2029")
    while rest:
        try:
            value, end = DECODER.raw_decode(rest)
        except (ValueError, RecursionError) as error:
            raise InputError(not_json(line, place, error)) from None
        values.append(value)
        rest = rest[end:].lstrip("\ufeff \t\r\n\x85\u2028\u2029")
    return values


def _json_values(file: TextIO, path: Path, longest: int) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of each element of an array, or of each value of a file.

    The memory is that of the longest element. InputError for an array without its end.
    """
    separators = " \t\n\ufeff"
    text = file.read(CHUNK_CHARACTERS)
    is_open = text.lstrip(separators).startswith("[")
    if is_open:
        text = text.replace("[", " ", 1)
        separators += ",]"
    position = 0
    line = 1
    while True:
        while text[position : position + 1] in separators and position < len(text):
            line += text[position] == "\n"
            is_open = is_open and text[position] != "]"
            position += 1
        try:
            value, end = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            # The value is invalid, or its end is not yet read.
            more = ""
            if _may_be_cut(error, text):
                more = file.read(max(CHUNK_CHARACTERS, len(text) - position))
                if not more and position == len(text):
                    if is_open:
                        raise InputError(_no_end(path, line)) from None
                    return
            if not more:
                raise InputError(not_json(text[position:], Place(path, line), error)) from None
            text = text[position:] + more
            position = 0
            if len(text) > longest:
                raise TooLong(_too_long(path, line)) from None
            continue
        yield line, value
        line += text.count("\n", position, end)
        position = end


def _may_be_cut(error: Exception, text: str) -> bool:
    """Return whether a JSON value may be valid with more characters after the end of the text."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos + LONGEST_WORD > len(text)


def _table_records(path: Path, fields: Fields) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(
            f"{path} needs pyarrow to be read, which cannot be imported ({error}); {INSTALL_PYARROW}"
        ) from error
    number = 0
    with reading(path):
        if path.stat().st_size == 0:
            return
        try:
            # Without buffers the file is read by column and row group, which may be gigabytes.
            with ParquetFile(path, pre_buffer=False, buffer_size=CHUNK_CHARACTERS) as table:
                columns = columns_of(table.schema_arrow.names, fields)
                if not columns:
                    raise no_field(_sample_row(table.schema_arrow), fields, path)
                for batch in table.iter_batches(TABLE_ROWS, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield _record(row, fields, Place(path, number))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} cannot be read as a parquet file after row {number} ({str(error).strip()}); create "
                "or copy it again"
            ) from error


def _sample_row(schema: Any) -> dict[str, Any]:
    """Return a row of a table with None in each column, and one object in columns of objects."""
    row: dict[str, Any] = {}
    for column in schema:
        item = getattr(column.type, "value_type", None)
        names = [item.field(i).name for i in range(item.num_fields)] if item is not None else []
        row[column.name] = [dict.fromkeys(names)] if names else None
    return row


def _no_end(path: Path, number: int) -> str:
    return f"{path} is cut off: no closing ] at the end of the file (line {number}); create or copy it again"


def _too_long(path: Path, number: int) -> str:
    return (
        f"{path} line {number} has more than {MAX_RECORD:,} characters; divide it into several records, or "
        "write the text as .txt"
    )
