"""Read the config.json of a Hugging Face folder as an architecture, and write a config.json.

This file reads only JSON and file names and does not import torch, so it is fast on a laptop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch
from minitron_mp.models.families import FAMILIES
from minitron_mp.models.families.family import (
    COMPUTATION_WORDS,
    DEFAULTS,
    DROPOUT_WORDS,
    KERNEL_SETTINGS,
    ON_BY_DEFAULT,
    Family,
)
from minitron_mp.models.model_folder import (
    TOKEN_KEYS,
    asset_problems,
    missing_config_problem,
    missing_weights_problem,
    read_json,
    require_folder,
    subfolder_problem,
    unknown_tokens,
    weight_files,
)
from minitron_mp.models.rope import read_rope, rope_contradictions, rope_keys, rope_problems

REQUIRED_SIZES = (
    "hidden_size",
    "ffn_hidden_size",
    "num_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
"""Fields of Arch that config.json must give, under the family's names."""
BOOLEANS = ("use_cache", "attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window")
"""Keys of config.json that are true or false. transformers 5 rejects null."""

MAX_SIZE, MAX_LAYERS = 2**31 - 1, 10_000
"""Largest values that are taken for sizes and not for damage."""

OPTIONAL_SIZES = ("num_query_groups", "kv_channels")
"""Fields of Arch that may be missing or null."""

STALE_KEYS = (
    "auto_map",
    "custom_pipelines",
    "quantization_config",
    "_name_or_path",
    "_commit_hash",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "pruned_heads",
)
"""Keys of config.json that describe the source and not the written model: Python files that the export
does not contain, names and commits of the Hub, and choices of the process that saved it.

transformers_version stays. transformers reads it as the version that wrote the tokenizer's files, and
those are copied.
"""


def read_arch(folder: Path, *, weights: bool = True) -> Arch:
    """Return the architecture of a Hugging Face folder.

    weights: require weight files, too. InputError lists every setting that is not supported.
    """
    require_folder(folder)
    title = f"{folder} cannot be used:"
    problems = []
    if weights:
        if not weight_files(folder).paths:
            problems.append(missing_weights_problem(folder))
        problems += asset_problems(folder)
    if not (folder / "config.json").is_file():
        problem = subfolder_problem(folder)
        refuse(title, [problem] if problem else [])
        refuse(title, [missing_config_problem(folder), *problems])
    config = read_json(folder / "config.json")
    family = FAMILIES.get(str(config.get("model_type", "")))
    if family is None or not _is_supported_class(config.get("architectures"), family):
        refuse(title, [*problems, _family_problem(config)])
    assert family is not None
    problems += _unknown_setting_problems(config, family) + rope_contradictions(config)
    problems += _type_problems(config, family)
    config = {**DEFAULTS, **family.defaults, **config}
    refuse(title, problems + _size_problems(config, family) + _setting_problems(config, family))
    return _arch(config, family, title)


def unused_setting_notes(folder: Path) -> list[str]:
    """Return a sentence about the keys of config.json that set a dropout; empty if there are none."""
    config = read_json(folder / "config.json")
    unused = [f"{key} {value}" for key, value in config.items() if value and _is_dropout(key)]
    if not unused:
        return []
    return [f"config.json has {', '.join(unused)}; not used, because this package trains without dropout"]


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
    for key in STALE_KEYS:
        written.pop(key, None)
    if config.get("layer_types"):
        written["layer_types"] = config["layer_types"][: arch.num_layers]
    written |= {key: getattr(arch, name) for name, key in family.config_fields.items()}
    written |= rope_keys(arch, family)
    written |= unknown_tokens(config, arch.vocab_size)
    written["architectures"] = [family.transformers_class]
    written["model_type"] = arch.family
    written["dtype"] = dtype
    written["torch_dtype"] = dtype  # for transformers before 4.56
    return written


def _is_supported_class(architectures: object, family: Family) -> bool:
    """Return whether `architectures` of config.json is missing, empty, or one class of the family."""
    classes = (family.transformers_class, *family.other_architectures)
    return not architectures or architectures in [[name] for name in classes]


def _family_problem(config: Mapping[str, object]) -> str:
    supported = ", ".join(f"{family.name} ({family.transformers_class})" for family in FAMILIES.values())
    return (
        f"model_type {config.get('model_type', '')!r} with architectures {config.get('architectures')} "
        f"is not supported; give a model of one of these families: {supported}"
    )


def _arch(config: dict[str, Any], family: Family, title: str) -> Arch:
    key_of = family.config_fields
    heads, groups, width = (
        key_of[name] for name in ("num_attention_heads", "num_query_groups", "kv_channels")
    )
    config[groups] = config.get(groups) or config[heads]
    config[width] = config.get(width) or config[key_of["hidden_size"]] // config[heads]
    rope = read_rope(config)
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
            rows.append(f"  - {key}: {problem['msg']}, given {problem['input']!r}; correct config.json")
        raise InputError("\n".join([title, *rows])) from error


def _size_problems(config: Mapping[str, Any], family: Family) -> list[str]:
    key_of = family.config_fields
    problems = []
    for key in (key_of[name] for name in REQUIRED_SIZES):
        if not _is_positive(config.get(key)):
            problems.append(f"{key} is {config.get(key)!r}, not a positive integer; correct config.json")
    for key in (key_of[name] for name in OPTIONAL_SIZES):
        size = config.get(key)
        if size is not None and not _is_positive(size):
            problems.append(f"{key} is {size!r}, not a positive integer; correct config.json")
    for name in (*REQUIRED_SIZES, *OPTIONAL_SIZES):
        size, largest = config.get(key_of[name]), MAX_LAYERS if name == "num_layers" else MAX_SIZE
        if isinstance(size, int) and size > largest:
            problems.append(f"{key_of[name]} is {size}; at most {largest:,} is possible; correct config.json")
    heads, groups = config.get(key_of["num_attention_heads"]), config.get(key_of["num_query_groups"])
    if not problems and groups and heads is not None and heads % groups:
        problems.append(
            f"{key_of['num_attention_heads']} {heads} is not a multiple of "
            f"{key_of['num_query_groups']} {groups}; correct config.json"
        )
    return problems


def _type_problems(config: Mapping[str, Any], family: Family) -> list[str]:
    """Return the values that transformers 5 rejects because of their type, when it reads config.json."""

    def is_id(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    problems = []
    for key in BOOLEANS:
        if key in config and not isinstance(config[key], bool):
            problems.append(
                f"{key} is {json.dumps(config[key])}, not true or false; correct it in config.json, or "
                "remove the key"
            )
    for key in (family.config_fields["norm_epsilon"], "initializer_range"):
        value = config.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            problems.append(f"{key} is {json.dumps(value)}, not a number; correct config.json")
    for key in TOKEN_KEYS:
        value = config.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if value is not None and not all(is_id(id) for id in ids):
            problems.append(f"{key} is {json.dumps(value)}, not an id such as 2; correct config.json")
    layers, types = config.get(family.config_fields["num_layers"]), config.get("layer_types")
    if isinstance(types, list) and is_id(layers) and len(types) != layers:
        problems.append(
            f"layer_types has {len(types)} entries for {layers} layers; give one entry for each layer in "
            "config.json"
        )
    return problems


def _is_positive(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def _unknown_setting_problems(config: Mapping[str, Any], family: Family) -> list[str]:
    """Return a problem for each unread key that may change the computation, judged by its name.

    config: as in the file, without defaults. Transformers ignores keys that its class does not
    have. But a renamed or new setting must not be lost silently, so the user decides. A key without
    one of COMPUTATION_WORDS in its name is not found.
    """
    return [
        f"{key} is {value!r}; the family {family.name} does not read this key, and its name suggests that "
        f"it changes the result. Remove it from config.json if {family.transformers_class} ignores it. "
        "Otherwise give another model"
        for key, value in config.items()
        if key not in family.settings and not key.startswith(("_", *KERNEL_SETTINGS))
        if _may_change_computation(key, value)
    ]


def _is_dropout(key: str) -> bool:
    return any(word in key for word in DROPOUT_WORDS)


def _may_change_computation(key: str, value: object) -> bool:
    """Return whether a setting with this name and value may change the computation.

    A missing or empty value does not, nor does a dropout. False and 0 do if they switch off what
    all families do.
    """
    if _is_dropout(key):
        return False
    if isinstance(value, (bool, int, float)) and not value:
        return key in ("rope", "rotary") or any(word in key for word in ON_BY_DEFAULT)
    return bool(value) and any(word in key for word in COMPUTATION_WORDS)


def _setting_problems(config: Mapping[str, Any], family: Family) -> list[str]:
    problems = [
        f"{name} is {config[name]!r}; this package supports only {value!r}, so give another model"
        for name, value in family.required_settings.items()
        if name not in ("quantization_config", *BOOLEANS) or isinstance(config.get(name), bool)
        if config.get(name) not in (value, None)
    ]
    if _is_quantized(config.get("quantization_config")):
        problems.append(
            f"quantization_config is {config['quantization_config']!r}; quantized weights are not supported, "
            "so give the model in bf16, fp16 or fp32; if its weights are not quantized, remove this key from "
            "config.json"
        )
    layer_types = config.get("layer_types") or []
    unsupported_types = sorted({*map(str, layer_types)} - {"full_attention"})
    if unsupported_types:
        problems.append(
            f"layer_types contains {', '.join(unsupported_types)}; only full_attention is supported, so "
            "give another model"
        )
    problems += [
        f"{name} is {value}; give a finite number"
        for name, value in config.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    problems += _pad_problems(config)
    return [*problems, *family.config_problems(config), *rope_problems(config, family)]


def _is_quantized(settings: object) -> bool:
    """Return whether quantization_config quantizes. bitsandbytes may be switched off in it."""
    if not isinstance(settings, dict) or settings.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return bool(settings)
    switches = [settings[key] for key in ("load_in_4bit", "load_in_8bit") if key in settings]
    return any(switches) if switches else bool(settings)


def _pad_problems(config: Mapping[str, Any]) -> list[str]:
    """Return a problem if transformers cannot build the embedding because of the pad token."""
    pad, vocab_size = config.get("pad_token_id"), config.get("vocab_size")
    if not isinstance(pad, int) or not isinstance(vocab_size, int) or pad < vocab_size:
        return []
    return [
        f"pad_token_id is {pad}, above the last id {vocab_size - 1} of vocab_size {vocab_size}, so that "
        "transformers cannot load the model; set it to null, or to the id of the end of text"
    ]
