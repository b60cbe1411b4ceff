"""The reference of all recipe keys, in Markdown.

Types, defaults and ranges come from the schemas. Descriptions come from the docstrings.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import typing
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from minitron_mp.config.base import NOT_IN_RESULT, Count, Section
from minitron_mp.config.mistakes import section_type
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.rounds import Keys

INTRODUCTION = """# Recipe reference

`minitron-mp reference --output docs/reference.md` writes this page; do not edit it. Every command
accepts a YAML recipe with these keys, and overrides such as `distill.steps=50`. A key with the mark
† does not change the result of a stage, so a change of it reruns no stage.
"""

LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def recipe_reference() -> str:
    """Return the reference as Markdown: one table for each section, in the order of the recipe."""
    parts = [INTRODUCTION, *_section(Recipe, "")]
    return "\n".join(parts)


def _section(section: type[Section], prefix: str) -> list[str]:
    """Return the Markdown of a section and its subsections. prefix: of its keys, "distill."."""
    title = f"`{prefix[:-1]}`" if prefix else "Top level"
    docs = field_docstrings(section)
    lines = [f"## {title}", "", _wrapped(inspect.getdoc(section) or ""), ""]
    lines += ["| key | type | default | description |", "| --- | --- | --- | --- |"]
    nested: list[str] = []
    for name, field in section.model_fields.items():
        inner = section_type(field.annotation)
        mark = " †" if field.json_schema_extra == NOT_IN_RESULT else ""
        key = f"{prefix}{name}" + (".NAME" if typing.get_origin(field.annotation) is dict else "")
        kind = f"[section](#{_anchor(key)})" if inner else _type(field.annotation, field)
        if inner and key.endswith(".NAME"):
            kind = f"map from NAME to {kind}"
        cells = [f"`{name}`{mark}", kind, _default(field), _unwrapped(docs.get(name, ""))]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if inner is not None:
            nested += _section(inner, f"{key}.")
    return [*lines, "", *nested]


def field_docstrings(section: type[Section]) -> dict[str, str]:
    """Return field -> the docstring below its definition, also for inherited fields."""
    docs: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if not (issubclass(base, Section) and base is not Section):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        body = typing.cast(ast.ClassDef, tree.body[0]).body
        for field, text in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                docs[field.target.id] = str(text.value.value)
    return docs


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    """Return a type in the words of YAML, with the limits of the field."""
    limits = _limits(field) if field else ""
    if annotation is Count:
        return f"number{limits}"
    if annotation == Keys:
        return "keys and values"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], field)
    if origin in (Union, UnionType):
        kinds = [_type(kind, field) for kind in arguments if kind is not NoneType]
        return ", or ".join(kinds)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (list, tuple):
        return f"list of {_plural(_type(arguments[0]))}"
    if origin is dict:
        return f"map from {_type(arguments[0])} to {_type(arguments[1])}"
    words = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return words[annotation] + limits


def _plural(words: str) -> str:
    """Return the type of a list's elements in the plural: "list of texts"."""
    return {"integer": "integers", "number": "numbers", "text": "texts"}.get(words, words)


def _limits(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in LIMITS.items()
        if hasattr(limit, name)
    ]
    return f" {' and '.join(limits)}" if limits else ""


def _default(field: FieldInfo) -> str:
    """Return the default as YAML, "required" if there is none, "" for a section or null."""
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None or isinstance(value, Section):
        return ""
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _anchor(name: str) -> str:
    """Return the anchor of the heading of a section. GitHub removes the dots."""
    return name.replace(".", "").lower()


def _wrapped(text: str) -> str:
    """Return the paragraphs of a docstring, wrapped for Markdown."""
    return "\n\n".join(textwrap.fill(_unwrapped(part), 100) for part in text.split("\n\n"))


def _unwrapped(text: str) -> str:
    """Return a docstring on one line, for a table cell."""
    return " ".join(text.split())
