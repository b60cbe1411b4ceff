"""Hugging Face folder <-> canonical tensors.

Canonical: the tensor of one key of arch.AXES, for one layer where the key has a layer axis (that axis is taken off), in
Megatron-Core's layout, the vocabulary padded with zero rows. All families name their weights alike, so one table maps them.
No megatron and no transformers here: config.json is read as JSON, the weights with safetensors.

    h hidden  f ffn  v padded vocabulary  np heads  ng query groups  hn head width  L layers

With 4 heads in 2 groups, each name hn rows:
    Hugging Face  q_proj: q0 q1 q2 q3   k_proj: k0 k1   v_proj: v0 v1
    canonical     linear_qkv: q0 q1 k0 v0  q2 q3 k1 v1
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minitron_mp.arch import ATTENTION, AXES, MLP, Arch
from minitron_mp.config import InputError, refuse

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NAMES: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": (EMBEDDING,),
    ATTENTION + "linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    ATTENTION + "linear_qkv.layer_norm_bias": ("input_layernorm.bias",),
    ATTENTION + "linear_qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ATTENTION + "linear_qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    ATTENTION + "q_layernorm.weight": ("self_attn.q_norm.weight",),
    ATTENTION + "k_layernorm.weight": ("self_attn.k_norm.weight",),
    ATTENTION + "linear_proj.weight": ("self_attn.o_proj.weight",),
    MLP + "linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    MLP + "linear_fc1.layer_norm_bias": ("post_attention_layernorm.bias",),
    MLP + "linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    MLP + "linear_fc2.weight": ("mlp.down_proj.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "decoder.final_layernorm.bias": ("model.norm.bias",),
    "output_layer.weight": (HEAD,),
}
"""Canonical key -> the Hugging Face weights that hold its rows, in this order; below model.layers.N where it has a layer axis.
Without a gate the first name of fc1 goes."""

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
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
    "nemotron": {"max_position_embeddings": 4096, "norm_eps": 1e-5, "partial_rotary_factor": 0.5, "hidden_act": "relu2"},
}
"""What transformers takes when config.json leaves a key out; for all families tie_word_embeddings false, rms_norm_eps 1e-6."""

ONLY = {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0, "use_sliding_window": False, "quantization_config": None}
"""Settings of config.json that change the computation, and the one value that is computed here."""

LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""Megatron-Core has these in its code; only the factor can be chosen."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
ASSETS = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"]
ASSETS += ["vocab.*", "merges.txt", "*.model", "tekken.json", "LICENSE*", "NOTICE*"]


def fields(family: str) -> dict[str, str]:
    """Field of Arch -> key of a family's config.json."""
    return FIELDS | ({"norm_epsilon": "norm_eps"} if family == "nemotron" else {})


def has_weights(folder: Path) -> bool:
    """Whether a folder holds more of a model than its config.json."""
    return bool(_weight_files(folder))


def read_arch(folder: Path, *, weights: bool = True) -> Arch:
    """The architecture of a Hugging Face folder; InputError with everything in it that we cannot compute. weights: they must be there, too."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give a Hugging Face model folder: config.json, safetensors weights, tokenizer")
    problems = (
        []
        if not weights or _weight_files(folder)
        else ["no model.safetensors or model.safetensors.index.json; write them with save_pretrained of transformers"]
    )
    if not (folder / "config.json").is_file():
        refuse(f"{folder} cannot be used:", ["no config.json", *problems])
    config = _read_json(folder / "config.json")
    family = config.get("model_type", "")
    if family not in FAMILIES or config.get("architectures") not in (None, [], [FAMILIES[family]]):
        supported = ", ".join(f"{name} ({architecture})" for name, architecture in FAMILIES.items())
        problems.append(f"model_type {family!r} with architectures {config.get('architectures')} is not supported; supported: {supported}")
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
            **{name: config[key] for name, key in fields(family).items()},
        )
    except ValidationError as error:
        given = [f"{fields(family).get(str(e['loc'][0]), e['loc'][0])}: {e['msg']}, given {e['input']!r}" for e in error.errors()]
        raise InputError("\n".join([f"{folder} cannot be used:", *(f"  - {row}" for row in given)])) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not keys and values; fetch it again")
    return content


def _size_problems(config: dict[str, Any]) -> list[str]:
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"]
    names += [name for name in ("head_dim", "num_key_value_heads") if isinstance(config.get(name), int)]  # or absent, or null
    problems = [f"{name} is {config.get(name)!r}, not a positive whole number" for name in names if not (isinstance(n := config.get(name), int) and n > 0)]
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    problems += [f"{n} is {config[n]!r}, not a whole number" for n in ("num_key_value_heads", "head_dim") if not isinstance(config.get(n), (int, type(None)))]
    if not problems and groups and heads % groups:
        problems.append(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    return problems


def _setting_problems(config: dict[str, Any]) -> list[str]:
    family = config["model_type"]
    only_here = ONLY | {"hidden_act": "relu2" if family == "nemotron" else "silu"}
    problems = [f"{name} is {config[name]!r}; only {only!r} is supported" for name, only in only_here.items() if config.get(name) not in (only, None)]
    if others := sorted({*(config.get("layer_types") or [])} - {"full_attention"}):
        problems.append(f"layer_types holds {', '.join(others)}; only full_attention is supported")
    window, positions = config.get("sliding_window"), config["max_position_embeddings"]
    if family == "mistral" and window and positions and window < positions:
        problems.append(f"sliding_window is {window}, below max_position_embeddings {positions}; set it to null if all sequences stay within the window")
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "llama3") or any(isinstance(value, dict) for value in rope.values()):
        return [*problems, f"rope settings {rope} are not supported; supported: rope_type 'default' or 'llama3', one setting for all layers"]
    fixed = ({} if family == "nemotron" else {"partial_rotary_factor": 1}) | (LLAMA3_ROPE if rope["rope_type"] == "llama3" else {})
    problems += [f"{name} of the rope settings is {rope.get(name)}; only {only} is supported" for name, only in fixed.items() if rope.get(name) != only]
    return problems + (["the llama3 rope settings have no factor"] if rope["rope_type"] == "llama3" and not rope.get("factor") else [])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, from rope_parameters (transformers 5) or rope_theta and rope_scaling (transformers 4)."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    given = given if isinstance(given, dict) else {"rope_type": given}
    defaults = {name: config.get(name) or default for name, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 1))}
    return {"rope_type": given.get("type", "default"), **defaults, **given}


class Weights:
    """The weights of a Hugging Face folder, read tensor by tensor. dtype: of the embedding, and as a rule of all.

    Opening reads the headers only; InputError with every missing, unknown or misshapen tensor.
    """

    def __init__(self, folder: Path, arch: Arch) -> None:
        self.arch = arch
        self.files: dict[str, Any] = {}
        for path in _weight_files(folder):
            try:
                file = safe_open(path, "pt")
            except SafetensorError as error:
                raise InputError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from error
            self.files |= dict.fromkeys(file.keys(), file)
        refuse(f"the weights in {folder} do not fit its config.json:", self._problems())

    def tensor(self, key: str, layer: int | None = None) -> torch.Tensor:
        """Canonical tensor on the CPU in the file's dtype; InputError when a value is not finite."""
        parts = [self._read(name) for name in _names(key, layer, self.arch)]
        if key == "embedding.word_embeddings.weight" and self.arch.tied and HEAD in self.files and not torch.equal(parts[0], self._read(HEAD)):
            # transformers 4 would take the embedding as head, transformers 5 would untie them.
            raise InputError(f"tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; set it to false in config.json if the head is meant")
        return _to_canonical(key, parts, self.arch)

    def _read(self, name: str) -> torch.Tensor:
        tensor = self.files[name].get_tensor(name)
        # aminmax passes a NaN on, and reads once where isfinite of every value makes several tensors as large.
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise InputError(f"{name} holds a NaN or an infinity; the file is damaged, or training had diverged")
        return tensor

    def _problems(self) -> list[str]:
        expected = hf_shapes(self.arch)
        problems = [f"{name} is missing" for name in expected if name not in self.files]
        for name, file in self.files.items():
            header = file.get_slice(name)
            shape, dtype = tuple(header.get_shape()), header.get_dtype()
            if name not in expected:
                if name != HEAD and not name.endswith("rotary_emb.inv_freq"):
                    problems.append(f"{name} is no weight of a {self.arch.family} with this config.json")
            elif shape != expected[name]:
                problems.append(f"{name} has shape {shape}, config.json asks for {expected[name]}")
            elif dtype not in DTYPES:
                problems.append(f"{name} has dtype {dtype}; supported: {', '.join(DTYPES)}")
        return problems


def check_weights(folder: Path, arch: Arch) -> None:
    """InputError with every missing, unknown or misshapen tensor; reads no data."""
    Weights(folder, arch)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model; none when it has none. InputError when a shard is missing."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} has no weight_map of weight names to files; fetch it again")
    shards = sorted({folder / name for name in weight_map.values()})
    refuse(f"{folder} is not whole:", [f"{path.name} is missing" for path in shards if not path.is_file()])
    return shards


def canonical_keys(arch: Arch) -> Iterator[tuple[str, int | None]]:
    """(key, layer) of every canonical tensor; layer is None where the key has no layer axis."""
    for key in arch.shapes():
        yield from ((key, layer) for layer in (range(arch.num_layers) if AXES[key][0] == "layer" else [None]))


def hf_shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of the Hugging Face model, without padding."""
    columns = {key: shape[(AXES[key][0] == "layer") + 1 :] for key, shape in arch.shapes().items()}
    return {name: (rows, *columns[key]) for key, layer in canonical_keys(arch) for name, rows in zip(_names(key, layer, arch), _rows(key, arch))}


def to_hf(key: str, layer: int | None, tensor: torch.Tensor, arch: Arch) -> dict[str, torch.Tensor]:
    """Hugging Face name -> tensor, from a canonical tensor; views of it where possible."""
    assert tensor.shape == arch.shapes()[key][layer is not None :], (key, layer, tensor.shape)
    rows = _rows(key, arch)
    if _row_axis(key) == "qkv":
        grouped = tensor.unflatten(0, (arch.num_query_groups, -1))  # [ng, (np/ng + 2) hn, ...]
        parts = [part.flatten(0, 1) for part in grouped.split([n // arch.num_query_groups for n in rows], dim=1)]
    else:
        parts = tensor[: sum(rows)].split(rows)
    return dict(zip(_names(key, layer, arch), parts))


def _to_canonical(key: str, parts: list[torch.Tensor], arch: Arch) -> torch.Tensor:
    axis = _row_axis(key)
    if axis == "qkv":
        return torch.cat([part.unflatten(0, (arch.num_query_groups, -1)) for part in parts], dim=1).flatten(0, 1)  # [(np + 2 ng) hn, ...]
    if axis == "vocab":
        parts = [*parts, parts[0].new_zeros(arch.padded_vocab_size - arch.vocab_size, arch.hidden_size)]
    return torch.cat(parts)


def _row_axis(key: str) -> str:
    return AXES[key][AXES[key][0] == "layer"]


def _rows(key: str, arch: Arch) -> list[int]:
    """Rows of each Hugging Face weight of a key."""
    axis, key_value = _row_axis(key), arch.num_query_groups * arch.kv_channels
    several = {"qkv": [arch.axis_size("heads"), key_value, key_value], "gate_up": [arch.ffn_hidden_size] * (1 + arch.gated), "vocab": [arch.vocab_size]}
    return several.get(axis) or [arch.axis_size(axis)]


def _names(key: str, layer: int | None, arch: Arch) -> list[str]:
    names = NAMES[key] if arch.gated or _row_axis(key) != "gate_up" else NAMES[key][1:]
    return [name if layer is None else f"model.layers.{layer}.{name}" for name in names]


def assets(folder: Path) -> list[Path]:
    """config.json and what else belongs to a model beside its weights: tokenizer, generation settings, licence."""
    return sorted({path for pattern in ASSETS for path in folder.glob(pattern) if path.is_file()})


def write_folder(
    folder: Path, source: Path, arch: Arch, dtype: torch.dtype, tensors: Iterable[tuple[str, int | None, torch.Tensor]], *, max_shard_bytes: float = 5e9
) -> None:
    """Write a model that transformers loads. Not atomic: give a folder that takes its place when it is whole.

    source: folder with the assets() of the model that this one came from. tensors: (key, layer, canonical tensor), one for
    each of canonical_keys(arch), in any order. Holds one shard and one tensor at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy_assets(source, folder, _new_config(_read_json(source / "config.json"), arch, dtype))
    named = (item for key, layer, tensor in tensors for item in to_hf(key, layer, tensor, arch).items())
    written = write_weights(folder, named, dtype, max_shard_bytes=max_shard_bytes)
    assert written == hf_shapes(arch).keys(), written ^ hf_shapes(arch).keys()


def copy_assets(source: Path | None, folder: Path, config: dict[str, Any]) -> None:
    """The assets() of a source with another config.json."""
    for path in assets(source) if source else []:
        shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_weights(folder: Path, named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, *, max_shard_bytes: float = 5e9) -> set[str]:
    """Hugging Face names and tensors -> safetensors files and their index, in a folder that has a config.json; the names."""
    shards = list(_write_shards(folder, named, dtype, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, (path, names, _) in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        path.rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size for *_, size in shards)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return set(weight_map)


def _new_config(config: dict[str, Any], arch: Arch, dtype: torch.dtype) -> dict[str, Any]:
    """The source's config.json with the sizes, family and dtype of the model that is written."""
    if config["model_type"] != arch.family:
        llama_only = ("pretraining_tp", "attention_bias", "mlp_bias")
        config = {name: value for name, value in config.items() if name not in llama_only} | {"sliding_window": None}
    if config.get("layer_types"):
        config = config | {"layer_types": config["layer_types"][: arch.num_layers]}
    name = str(dtype).removeprefix("torch.")
    sizes = {key: getattr(arch, name) for name, key in fields(arch.family).items()}
    # torch_dtype is for transformers before 4.56.
    return config | sizes | {"architectures": [FAMILIES[arch.family]], "model_type": arch.family, "dtype": name, "torch_dtype": name}


def _write_shards(folder: Path, named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, max_bytes: float) -> Iterator[tuple[Path, list[str], int]]:
    """Write the tensors file by file; yield each file, named without the number of files, the names in it, and the bytes of its tensors."""
    shard: dict[str, torch.Tensor] = {}
    num_bytes = number = 0

    def save() -> tuple[Path, list[str], int]:
        path = folder / f".shard-{number}"
        save_file(shard, path, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", path)  # safetensors writes for the owner only
        return path, list(shard), num_bytes

    for name, tensor in named:
        size = tensor.numel() * dtype.itemsize
        if shard and num_bytes + size > max_bytes:
            yield save()
            shard, num_bytes, number = {}, 0, number + 1
        # Always a copy: safetensors refuses views that share storage.
        shard[name] = tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        num_bytes += size
    yield save()
