"""Read the config.json of a Hugging Face folder as an architecture, and write a config.json.

This file reads only JSON and file names and does not import torch, so it is fast on a laptop.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch
from minitron_mp.models.families import FAMILIES
from minitron_mp.models.families.family import DEFAULTS, Family

LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""Values that are fixed in the code of Megatron-Core. Only the factor is a setting."""

REQUIRED_SIZES = (
    "hidden_size",
    "ffn_hidden_size",
    "num_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
"""Fields of Arch that config.json must give, under the family's names."""
OPTIONAL_SIZES = ("num_query_groups", "kv_channels")
"""Fields of Arch that may be missing or null."""


def has_weights(folder: Path) -> bool:
    """Return whether a folder contains the weights of a model."""
    return bool(weight_files(folder))


def read_arch(folder: Path, *, weights: bool = True) -> Arch:
    """Return the architecture of a Hugging Face folder.

    weights: require weight files, too. InputError lists every setting that is not supported.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; "
            "give a Hugging Face model folder: config.json, safetensors weights, tokenizer"
        )
    title = f"{folder} cannot be used:"
    problems = []
    if weights and not weight_files(folder):
        problems.append(
            "no model.safetensors or model.safetensors.index.json; "
            "write them with save_pretrained of transformers"
        )
    if not (folder / "config.json").is_file():
        refuse(title, ["no config.json", *problems])
    config = read_json(folder / "config.json")
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None or config.get("architectures") not in (None, [], [family.transformers_class]):
        refuse(title, [*problems, _family_problem(config)])
    assert family is not None
    config = {**DEFAULTS, **family.defaults, **config}
    refuse(title, problems + _size_problems(config, family) + _setting_problems(config, family))
    return _arch(config, family, title)


def new_config(config: Mapping[str, Any], arch: Arch, dtype: str) -> dict[str, Any]:
    """Return the content of config.json with the sizes, family and dtype of the written model.

    config: config.json of the model that it was made from. dtype: for example "bfloat16".
    """
    family = FAMILIES[arch.family]
    written = dict(config)
    if config["model_type"] != arch.family:
        conversion = FAMILIES[config["model_type"]].exports_as[arch.family]
        written = {name: value for name, value in config.items() if name not in conversion.drop}
        written |= conversion.add
    if config.get("layer_types"):
        written["layer_types"] = config["layer_types"][: arch.num_layers]
    written |= {key: getattr(arch, name) for name, key in family.config_fields.items()}
    written["architectures"] = [family.transformers_class]
    written["model_type"] = arch.family
    written["dtype"] = dtype
    written["torch_dtype"] = dtype  # for transformers before 4.56
    return written


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that contains an object. InputError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} contains {type(content).__name__}, not keys and values; download it again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model, or [] if the folder has none.

    InputError for a missing shard.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} has no weight_map of weight names to files; download it again")
    shards = sorted({folder / name for name in weight_map.values()})
    missing = [f"{path.name} is missing" for path in shards if not path.is_file()]
    refuse(f"{folder} is incomplete; download these files again:", missing)
    return shards


def _family_problem(config: Mapping[str, Any]) -> str:
    supported = ", ".join(f"{family.name} ({family.transformers_class})" for family in FAMILIES.values())
    return (
        f"model_type {config.get('model_type', '')!r} with architectures {config.get('architectures')} "
        f"is not supported; supported: {supported}"
    )


def _arch(config: dict[str, Any], family: Family, title: str) -> Arch:
    key_of = family.config_fields
    heads, groups, width = (
        key_of[name] for name in ("num_attention_heads", "num_query_groups", "kv_channels")
    )
    config[groups] = config.get(groups) or config[heads]
    config[width] = config.get(width) or config[key_of["hidden_size"]] // config[heads]
    rope = _rope(config)
    fields = {name: config[key] for name, key in family.config_fields.items()}
    try:
        return Arch(
            family=family.name,
            rotary_base=rope["rope_theta"],
            rotary_percent=rope["partial_rotary_factor"],
            rope_scaling_factor=rope["factor"] if rope["rope_type"] == "llama3" else None,
            **family.switches,
            **fields,
        )
    except ValidationError as error:
        rows = []
        for problem in error.errors():
            name = str(problem["loc"][0])
            key = family.config_fields.get(name, name)
            rows.append(f"  - {key}: {problem['msg']}, given {problem['input']!r}")
        raise InputError("\n".join([title, *rows])) from error


def _size_problems(config: Mapping[str, Any], family: Family) -> list[str]:
    key_of = family.config_fields
    problems = []
    for key in (key_of[name] for name in REQUIRED_SIZES):
        if not _is_positive(config.get(key)):
            problems.append(f"{key} is {config.get(key)!r}, not a positive integer")
    for key in (key_of[name] for name in OPTIONAL_SIZES):
        size = config.get(key)
        if size is not None and not _is_positive(size):
            problems.append(f"{key} is {size!r}, not a positive integer")
    heads, groups = config.get(key_of["num_attention_heads"]), config.get(key_of["num_query_groups"])
    if not problems and groups and heads is not None and heads % groups:
        problems.append(
            f"{key_of['num_attention_heads']} {heads} is not a multiple of "
            f"{key_of['num_query_groups']} {groups}"
        )
    return problems


def _is_positive(size: Any) -> bool:
    return isinstance(size, int) and size > 0


def _setting_problems(config: Mapping[str, Any], family: Family) -> list[str]:
    problems = [
        f"{name} is {config[name]!r}; only {value!r} is supported"
        for name, value in family.required_settings.items()
        if config.get(name) not in (value, None)
    ]
    unsupported_types = sorted({*(config.get("layer_types") or [])} - {"full_attention"})
    if unsupported_types:
        problems.append(
            f"layer_types contains {', '.join(unsupported_types)}; only full_attention is supported"
        )
    return [*problems, *family.config_problems(config), *_rope_problems(config, family)]


def _rope_problems(config: Mapping[str, Any], family: Family) -> list[str]:
    rope = _rope(config)
    is_nested = any(isinstance(value, dict) for value in rope.values())
    if rope["rope_type"] not in ("default", "llama3") or is_nested:
        return [
            f"rope settings {rope} are not supported; "
            "supported: rope_type 'default' or 'llama3', one setting for all layers"
        ]
    required = dict(family.required_rope)
    if rope["rope_type"] == "llama3":
        required |= LLAMA3_ROPE
    problems = [
        f"{name} of the rope settings is {rope.get(name)}; only {value} is supported"
        for name, value in required.items()
        if rope.get(name) != value
    ]
    if rope["rope_type"] == "llama3" and not rope.get("factor"):
        problems.append("the llama3 rope settings have no factor")
    return problems


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings.

    They are in rope_parameters (transformers 5) or in rope_theta and rope_scaling (transformers 4).
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        given = {"rope_type": given}
    return {
        "rope_type": given.get("type", "default"),
        "rope_theta": config.get("rope_theta") or 10000.0,
        "partial_rotary_factor": config.get("partial_rotary_factor") or 1,
        **given,
    }
