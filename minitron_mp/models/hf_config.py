"""config.json of a Hugging Face folder -> Arch, and which families there are. Reads JSON and file names only: no torch, so it is quick on a laptop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

FAMILIES["nemotron"] = "NemotronForCausalLM"

SWITCHES: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "nemotron": {"norm": "layer1p", "activation": "squared_relu"},
}
"""Fields of Arch that a family sets."""

FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "tied": "tie_word_embeddings",
    "norm_epsilon": "rms_norm_eps",
}
"""Field of Arch -> key of config.json; in fields() what a family calls otherwise."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "nemotron": {
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "hidden_act": "relu2",
    },
}
"""What transformers takes when config.json leaves a key out; for all families tie_word_embeddings false, rms_norm_eps 1e-6."""

ONLY = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "use_sliding_window": False,
    "quantization_config": None,
}
"""Settings of config.json that change the computation, and the one value that is computed here."""

LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""Megatron-Core has these in its code; only the factor can be chosen."""


def config_fields(family: str) -> dict[str, str]:
    """Field of Arch -> key of a family's config.json."""
    return FIELDS | ({"norm_epsilon": "norm_eps"} if family == "nemotron" else {})


def has_weights(folder: Path) -> bool:
    """Whether a folder holds more of a model than its config.json."""
    return bool(weight_files(folder))


def read_arch(folder: Path, *, weights: bool = True) -> Arch:
    """The architecture of a Hugging Face folder; InputError with everything in it that we cannot compute. weights: they must be there, too."""
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}; give a Hugging Face model folder: config.json, safetensors weights, tokenizer"
        )
    problems = (
        []
        if not weights or weight_files(folder)
        else [
            "no model.safetensors or model.safetensors.index.json; write them with save_pretrained of transformers"
        ]
    )
    if not (folder / "config.json").is_file():
        refuse(f"{folder} cannot be used:", ["no config.json", *problems])
    config = read_json(folder / "config.json")
    family = config.get("model_type", "")
    if family not in FAMILIES or config.get("architectures") not in (None, [], [FAMILIES[family]]):
        supported = ", ".join(f"{name} ({architecture})" for name, architecture in FAMILIES.items())
        problems.append(
            f"model_type {family!r} with architectures {config.get('architectures')} is not supported; supported: {supported}"
        )
        refuse(f"{folder} cannot be used:", problems)
    config = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6} | DEFAULTS[family] | config
    refuse(f"{folder} cannot be used:", problems + _size_problems(config) + _setting_problems(config))
    config["num_key_value_heads"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = _rope(config)
    try:
        return Arch(
            family=family,
            rotary_base=rope["rope_theta"],
            rotary_percent=rope["partial_rotary_factor"],
            rope_scaling_factor=rope["factor"] if rope["rope_type"] == "llama3" else None,
            **SWITCHES.get(family, {}),
            **{name: config[key] for name, key in config_fields(family).items()},
        )
    except ValidationError as error:
        given = [
            f"{config_fields(family).get(str(e['loc'][0]), e['loc'][0])}: {e['msg']}, given {e['input']!r}"
            for e in error.errors()
        ]
        raise InputError(
            "\n".join([f"{folder} cannot be used:", *(f"  - {row}" for row in given)])
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not keys and values; fetch it again")
    return content


def _size_problems(config: dict[str, Any]) -> list[str]:
    names = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    ]
    names += [
        name for name in ("head_dim", "num_key_value_heads") if isinstance(config.get(name), int)
    ]  # or absent, or null
    problems = [
        f"{name} is {config.get(name)!r}, not a positive whole number"
        for name in names
        if not (isinstance(n := config.get(name), int) and n > 0)
    ]
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    problems += [
        f"{n} is {config[n]!r}, not a whole number"
        for n in ("num_key_value_heads", "head_dim")
        if not isinstance(config.get(n), (int, type(None)))
    ]
    if not problems and groups and heads % groups:
        problems.append(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    return problems


def _setting_problems(config: dict[str, Any]) -> list[str]:
    family = config["model_type"]
    only_here = ONLY | {"hidden_act": "relu2" if family == "nemotron" else "silu"}
    problems = [
        f"{name} is {config[name]!r}; only {only!r} is supported"
        for name, only in only_here.items()
        if config.get(name) not in (only, None)
    ]
    if others := sorted({*(config.get("layer_types") or [])} - {"full_attention"}):
        problems.append(f"layer_types holds {', '.join(others)}; only full_attention is supported")
    window, positions = config.get("sliding_window"), config["max_position_embeddings"]
    if family == "mistral" and window and positions and window < positions:
        problems.append(
            f"sliding_window is {window}, below max_position_embeddings {positions}; set it to null if all sequences stay within the window"
        )
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "llama3") or any(
        isinstance(value, dict) for value in rope.values()
    ):
        return [
            *problems,
            f"rope settings {rope} are not supported; supported: rope_type 'default' or 'llama3', one setting for all layers",
        ]
    fixed = ({} if family == "nemotron" else {"partial_rotary_factor": 1}) | (
        LLAMA3_ROPE if rope["rope_type"] == "llama3" else {}
    )
    problems += [
        f"{name} of the rope settings is {rope.get(name)}; only {only} is supported"
        for name, only in fixed.items()
        if rope.get(name) != only
    ]
    return problems + (
        ["the llama3 rope settings have no factor"]
        if rope["rope_type"] == "llama3" and not rope.get("factor")
        else []
    )


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, from rope_parameters (transformers 5) or rope_theta and rope_scaling (transformers 4)."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    given = given if isinstance(given, dict) else {"rope_type": given}
    defaults = {
        name: config.get(name) or default
        for name, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 1))
    }
    return {"rope_type": given.get("type", "default"), **defaults, **given}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model; none when it has none. InputError when a shard is missing."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} has no weight_map of weight names to files; fetch it again")
    shards = sorted({folder / name for name in weight_map.values()})
    refuse(f"{folder} is not whole:", [f"{path.name} is missing" for path in shards if not path.is_file()])
    return shards
