"""Paths in a recipe: `~` and environment variables are expanded in every key that names a path."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from minitron_mp.errors import refuse

VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)
"""$NAME or ${NAME}."""

BRACED = re.compile(r"(?<!\\)\$\{([A-Za-z_]\w*)\}", re.ASCII)
"""${NAME} in a YAML recipe, which OmegaConf would read as the key NAME of the recipe."""


def expand_path(text: str) -> str:
    """Return a path with `~`, `~user`, `$NAME` and `${NAME}` expanded.

    ValueError for a variable that is not set, and for a home folder that does not exist. A file
    whose name contains such characters can be used: if it exists, its name is not expanded.
    """
    undefined = [name for name in _variables(text) if os.path.expandvars(f"${name}") == f"${name}"]
    if undefined:
        if os.path.lexists(text):
            return text
        raise ValueError(
            f"the environment variable {', '.join(undefined)} is not set, given {text!r}; "
            "set and export it, or write the whole path"
        )
    expanded = os.path.expanduser(os.path.expandvars(text))
    if not expanded.isascii() and any("\ud800" <= character <= "\udfff" for character in expanded):
        raise ValueError(f"{text!r} is not UTF-8 text; names of files must be UTF-8, so rename it")
    if "\0" in expanded:
        raise ValueError(f"{text!r} contains a null character, which no path may contain; remove it")
    if text and not expanded:
        raise ValueError(f"{text!r} is empty, because the variable is empty; set it, or write the path")
    if expanded.startswith("~") and not os.path.lexists(expanded):
        user = expanded.split("/")[0]
        raise ValueError(
            f"there is no home folder for {user}, given {text!r}; write the whole path, or ./{user} for a "
            "folder of this name"
        )
    return expanded


def _variables(text: str) -> list[str]:
    return list(dict.fromkeys(match[1] or match[2] for match in VARIABLE.finditer(text)))


def _require_path_or_paths(value: object) -> object:
    """Raise one error for both types. pydantic would raise one for each."""
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise PydanticCustomError("path_or_paths", "must be a path or a list of paths")
    return value


UserPath = Annotated[str, AfterValidator(expand_path)]
"""A path, in which `~` and environment variables are expanded."""

UserPaths = Annotated[
    list[UserPath], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
"""A list of paths. A single path may be given without brackets."""

UserPathOrPaths = Annotated[
    str | list[str],
    BeforeValidator(_require_path_or_paths),
    AfterValidator(
        lambda value: expand_path(value) if isinstance(value, str) else [expand_path(path) for path in value]
    ),
]
"""A path or a list of paths, as given."""


def variables_for_omegaconf(values: Any, keys: Mapping[str, Any], source: str) -> Any:
    """Return the content of a YAML recipe in which OmegaConf expands ${NAME} from the environment.

    NAME stays a reference to the recipe if the recipe has this key. InputError for a variable that
    is not set, and for ???, which OmegaConf reads as a value that is missing.
    """
    problems: list[str] = []

    def expand(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: expand(part, f"{key}.{name}" if key else str(name)) for name, part in value.items()}
        if isinstance(value, list):
            return [expand(part, key) for part in value]
        if not isinstance(value, str):
            return value
        if value == "???":
            problems.append(f"{key}: ??? stands for a value that is missing; write the value")

        def replace(match: re.Match[str]) -> str:
            name = match[1]
            if name in keys:
                return match[0]
            if os.path.expandvars(f"${name}") == f"${name}":
                problems.append(
                    f"{key}: {match[0]} is neither an environment variable nor a key of the recipe; set and "
                    "export it, or write the value"
                )
            return f"${{oc.env:{name}}}"

        return BRACED.sub(replace, value)

    expanded = expand(values, "")
    refuse(f"{source} cannot be used:", problems)
    return expanded
