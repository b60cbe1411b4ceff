"""Sections of the recipe: what they are made of, the text, the layout, what is measured and what comes out."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def _with_suffix(value: Any) -> Any:
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    if isinstance(value, str) and value[-1:].upper() in units:
        try:
            return float(value[:-1]) * units[value[-1].upper()]
        except ValueError:
            raise ValueError(f"{value!r} is no number of parameters; write 8.4e9, 8.4B or 102M") from None
    return value


Count = Annotated[float, BeforeValidator(_with_suffix)]

Paths = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""A list, or one path by itself."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
