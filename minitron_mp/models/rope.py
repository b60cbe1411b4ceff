"""The rotary settings of a config.json, in the forms of transformers 4 and 5.

    transformers 4   rope_theta, partial_rotary_factor, rope_scaling: {rope_type, factor, ...} or null
    transformers 5   rope_parameters: {rope_type, rope_theta, partial_rotary_factor, factor, ...}

Either form is read. Both are written, because a reader of one form ignores the other and computes
with rope_theta 10000.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minitron_mp.models.arch import Arch
from minitron_mp.models.families.family import Family

DEFAULT_THETA = 10000.0

ORIGINAL_POSITIONS = "original_max_position_embeddings"

LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, ORIGINAL_POSITIONS: 8192}
"""Values that are fixed in the code of Megatron-Core. Only the factor is a setting."""

KNOWN = {"rope_type", "rope_theta", "partial_rotary_factor", "factor", *LLAMA3_ROPE}
"""Settings of rope_scaling or rope_parameters."""

TOP_KEYS = ("rope_theta", "partial_rotary_factor")
"""Settings that transformers 4 has at the top of config.json."""

FORMS = ("rope_scaling", "rope_parameters")


def read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings in the form of transformers 5."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": DEFAULT_THETA, "partial_rotary_factor": 1}
    for _, settings in _forms(config):
        rope |= {name: value for name, value in settings.items() if value is not None}
    if rope["rope_type"] == "linear" and rope.get("factor") == 1:  # positions divided by 1
        rope["rope_type"] = "default"
    return rope


def rope_problems(config: Mapping[str, Any], family: Family) -> list[str]:
    """Return why the rotary settings are not supported. config: with the defaults of the family."""
    rope = read_rope(config)
    is_nested = any(isinstance(value, dict) for value in rope.values())
    if rope["rope_type"] not in ("default", "llama3") or is_nested:
        return [
            f"rope settings {rope} are not supported; "
            "supported: rope_type 'default' or 'llama3', one setting for all layers. If the model was "
            "trained without this scaling, and it was added for long contexts, remove it from config.json"
        ]
    required = dict(family.required_rope)
    if rope["rope_type"] == "llama3":
        required |= LLAMA3_ROPE
    problems = [
        f"{name} of the rope settings is {rope.get(name)}; only {value} is supported, so give another model"
        for name, value in required.items()
        if rope.get(name) != value
    ]
    if rope["rope_type"] == "llama3" and not rope.get("factor"):
        problems.append("the llama3 rope settings have no factor; add it to config.json")
    problems += [
        f"{name} is {config[name]}, and partial_rotary_factor is {rope['partial_rotary_factor']}, which "
        f"{family.transformers_class} uses; set partial_rotary_factor in config.json to the value that the "
        f"model was trained with, and remove {name}"
        for name in family.rope_aliases
        if config.get(name) not in (None, rope["partial_rotary_factor"])
    ]
    original = config.get(ORIGINAL_POSITIONS)
    # Without scaling it has no effect.
    if rope["rope_type"] == "llama3" and original not in (None, rope.get(ORIGINAL_POSITIONS)):
        problems.append(
            f"{ORIGINAL_POSITIONS} is {original} in config.json and {rope.get(ORIGINAL_POSITIONS)} in its "
            "rope settings; remove the first one"
        )
    unknown = sorted(key for key, value in rope.items() if value and key not in KNOWN)
    if unknown:
        problems.append(f"the rope settings have {', '.join(unknown)}; supported: {', '.join(sorted(KNOWN))}")
    numbers = ("rope_theta", "partial_rotary_factor", *(["factor"] if rope.get("factor") else []))
    problems += [
        f"{name} of the rope settings is {rope[name]!r}; give a positive number"
        for name in numbers
        if not _is_positive_number(rope[name])
    ]
    return problems


def rope_contradictions(config: Mapping[str, Any]) -> list[str]:
    """Return the settings that have different values in two places, so that readers differ.

    config: as it is in the file, without defaults.
    """
    problems = []
    first: dict[str, tuple[str, Any]] = {}
    for where, settings in _forms(config):
        for name, value in settings.items():
            if value is None:
                continue
            other, other_value = first.setdefault(name, (where, value))
            if other_value != value:
                problems.append(
                    f"{name} is {other_value!r} in {other} and {value!r} in {where}; transformers 4 and 5 "
                    "would not compute the same: keep the value that the model was trained with"
                )
    return problems


def rope_keys(arch: Arch, family: Family) -> dict[str, Any]:
    """Return the keys of config.json with the rotary settings of a model, in both forms."""
    scaling: dict[str, Any] | None = None
    if arch.rope_scaling_factor is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": arch.rope_scaling_factor,
            **{name: float(value) for name, value in LLAMA3_ROPE.items()},
            ORIGINAL_POSITIONS: LLAMA3_ROPE[ORIGINAL_POSITIONS],
        }
    top: dict[str, Any] = {"rope_theta": arch.rotary_base}
    if arch.rotary_percent != 1 or "partial_rotary_factor" in family.defaults:
        top["partial_rotary_factor"] = arch.rotary_percent
    parameters = {"rope_type": "default", **(scaling or {}), **top}
    return {**top, "rope_scaling": scaling, "rope_parameters": parameters}


def _forms(config: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (where, settings) for each place of config.json that has rotary settings.

    Later places override earlier ones, as in transformers 5.
    """
    top = {name: config[name] for name in TOP_KEYS if config.get(name) is not None}
    forms: list[tuple[str, dict[str, Any]]] = [("config.json", top)]
    for form in reversed(FORMS):
        given = config.get(form)
        if not given:
            continue
        settings = dict(given) if isinstance(given, dict) else {"rope_type": given}
        kind = settings.pop("type", None)
        settings["rope_type"] = settings.get("rope_type") or kind or "default"
        forms.append((form, settings))
    return forms


def _is_positive_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0
