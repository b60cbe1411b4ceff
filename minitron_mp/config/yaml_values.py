"""Values of a YAML recipe and of overrides: null, texts, lists and dictionaries.

Numbers and booleans stay the text that the user wrote, and the type of each key decides how the
text is read. YAML alone would read the folder 007 as 7, 2024_10_01 as 20241001, 12:30 as 750, and
the name `no` as false.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from minitron_mp.errors import InputError

if TYPE_CHECKING:
    from yaml import MappingNode, Node

Value: TypeAlias = "str | list[Value] | dict[str, Value] | None"

_NAME = r"(?:[^=\\.]|\\.)+"
OVERRIDE = re.compile(rf"(?P<key>{_NAME}(?:\.{_NAME})*)=(?P<value>.*)", re.DOTALL)
"""A dotted key, in which \\ escapes a character, and a value."""

STANDARD_TAGS = ("null", "bool", "int", "float", "str", "timestamp", "value", "merge", "seq", "map")
"""Tags of YAML, in short !!null and so on, that need no other type than those of a recipe."""


def read_yaml_file(path: str | Path) -> Value:
    """Return the content of a YAML file, {} for an empty one. Also from a pipe such as /dev/stdin.

    InputError for a file that is missing or cannot be read as YAML.
    """
    if Path(path).is_dir() or not Path(path).exists():
        raise InputError(f"no recipe at {path}; give a YAML file such as examples/quickstart.yaml")
    text = _decoded(Path(path).read_bytes(), path)
    content = _parsed(text, f"{path} cannot be read")
    return {} if content is None else content


def read_override(text: str) -> tuple[str, Value]:
    """Return the dotted key and the value of an override that matches OVERRIDE.

    A value that begins with a bracket, a brace or a quotation mark is YAML. Any other value is null,
    or the text itself, also where YAML would see a comment, an anchor or a tag.
    """
    match = OVERRIDE.fullmatch(text)
    assert match, text
    key, value = match["key"].strip(), match["value"].strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"the override {text!r} is not UTF-8 text; names of files and folders must be UTF-8, so rename it"
        ) from None
    if value in ("", "~", "null", "Null", "NULL"):
        return key, None
    if value[0] not in "[{'\"":
        return key, value
    return key, _parsed(value, f"the override {text!r} cannot be read", is_override=True)


def _decoded(data: bytes, path: str | Path) -> str:
    """Return the text of a recipe in UTF-8, or in UTF-16 with a byte order mark."""
    from yaml.reader import Reader

    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} is not UTF-8 text: line {line}, byte 0x{data[error.start]:02x} at offset "
            f"{error.start:,}; convert it to UTF-8"
        ) from error
    control = Reader.NON_PRINTABLE.search(text)
    if control:
        lines = text[: control.start()].split("\n")
        raise InputError(
            f"{path} contains the control character U+{ord(control[0]):04X} in line {len(lines)}, column "
            f"{len(lines[-1]) + 1}, which YAML does not allow; delete it"
        )
    return text


def _parsed(text: str, failure: str, *, is_override: bool = False) -> Value:
    """Return the value of a YAML text. failure: start of the error message."""
    from yaml import MarkedYAMLError, SafeLoader

    advice = "put the whole value in quotes: 'KEY=\"VALUE\"'" if is_override else "correct it"
    loader = None
    try:
        loader = SafeLoader(text)
        node = loader.get_single_node()
        if node is not None and is_override and node.end_mark.index < len(text):
            rest = text[node.end_mark.index :].strip()
            raise InputError(f"{failure}: {rest!r} follows the value; {advice}")
        return None if node is None else _Values().value(node)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark and not is_override else ""
        problem = str(error.problem)
        if problem.startswith("but "):
            problem = f"{error.context}, {problem}"
        raise InputError(f"{failure}: {where}{problem}; {advice}") from error
    except RecursionError:
        raise InputError(f"{failure}: it has too many brackets inside each other; correct it") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Values:
    """Values of the nodes of one YAML document. An alias has the value of its anchor."""

    def __init__(self) -> None:
        self.finished: dict[int, Value] = {}  # id of a node -> value
        self.open: set[int] = set()

    def value(self, node: Node) -> Value:
        from yaml import MappingNode, ScalarNode
        from yaml.constructor import ConstructorError

        if id(node) in self.finished:
            return self.finished[id(node)]
        if id(node) in self.open:
            raise ConstructorError(None, None, "a value contains itself", node.start_mark)
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in STANDARD_TAGS:
            raise ConstructorError(None, None, f"unknown tag {node.tag}", node.start_mark)
        self.open.add(id(node))
        value: Value
        if isinstance(node, ScalarNode):
            value = None if kind == "null" else node.value
        elif isinstance(node, MappingNode):
            value = self._dictionary(node)
        else:
            value = [self.value(part) for part in node.value]
        self.open.remove(id(node))
        self.finished[id(node)] = value
        return value

    def _dictionary(self, node: MappingNode) -> Value:
        """Return a dictionary. `<<: *anchor` adds the keys of other dictionaries."""
        from yaml import ScalarNode
        from yaml.constructor import ConstructorError

        added: list[Value] = []
        values: dict[str, Value] = {}
        for key, part in node.value:
            if not isinstance(key, ScalarNode):
                raise ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.tag.endswith(":merge"):
                more = self.value(part)
                added += more if isinstance(more, list) else [more]
            elif key.value in values:
                raise ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            else:
                values[key.value] = self.value(part)
        merged: dict[str, Value] = {}
        for other in reversed(added):  # the first one has precedence
            if not isinstance(other, dict):
                raise ConstructorError(None, None, "<< must be followed by keys and values", node.start_mark)
            merged |= other
        return merged | values
