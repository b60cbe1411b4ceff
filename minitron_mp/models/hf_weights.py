"""Hugging Face folder <-> canonical tensors.

Canonical: the tensor of one checkpoint key (models.parameters) in Megatron-Core's layout, the vocabulary padded with
zero rows. All families name their weights alike, so one table maps them.
No megatron and no transformers here: hf_config.py reads config.json as JSON, the weights are read with safetensors.

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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch, BlockArch
from minitron_mp.models.blocks.dense import ATTENTION, MLP
from minitron_mp.models.hf_config import FAMILIES, config_fields
from minitron_mp.models.hf_config import read_json as _read_json
from minitron_mp.models.hf_config import weight_files as _weight_files
from minitron_mp.models.parameters import dims_of, split_key

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

NAMES: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": (EMBEDDING,),
    ATTENTION + "linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    ATTENTION + "linear_qkv.layer_norm_bias": ("input_layernorm.bias",),
    ATTENTION + "linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    ATTENTION + "linear_qkv.bias": (
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
    ),
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

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

ASSETS = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
]

ASSETS += ["vocab.*", "merges.txt", "*.model", "tekken.json", "LICENSE*", "NOTICE*"]


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
                raise InputError(
                    f"{path} is damaged or no safetensors file ({error}); fetch it again"
                ) from error
            self.files |= dict.fromkeys(file.keys(), file)
        refuse(f"the weights in {folder} do not fit its config.json:", self._problems())

    def tensor(self, key: str) -> torch.Tensor:
        """Canonical tensor on the CPU in the file's dtype; InputError when a value is not finite."""
        parts = [self._read(name) for name in _names(key, self.arch)]
        if (
            key == "embedding.word_embeddings.weight"
            and self.arch.tied
            and HEAD in self.files
            and not torch.equal(parts[0], self._read(HEAD))
        ):
            # transformers 4 would take the embedding as head, transformers 5 would untie them.
            raise InputError(
                f"tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; set it to false in config.json if the head is meant"
            )
        return _to_canonical(key, parts, self.arch)

    def _read(self, name: str) -> torch.Tensor:
        tensor = self.files[name].get_tensor(name)
        # aminmax passes a NaN on, and reads once where isfinite of every value makes several tensors as large.
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise InputError(
                f"{name} holds a NaN or an infinity; the file is damaged, or training had diverged"
            )
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


def hf_shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of the Hugging Face model, without padding."""
    return {
        name: (rows, *shape[1:])
        for key, shape in arch.shapes().items()
        for name, rows in zip(_names(key, arch), _rows(key, arch))
    }


def to_hf(key: str, tensor: torch.Tensor, arch: Arch) -> dict[str, torch.Tensor]:
    """Hugging Face name -> tensor, from a canonical tensor; views of it where possible."""
    rows = _rows(key, arch)
    if _row_dim(key) == "qkv":
        groups = _block(key, arch).num_query_groups
        grouped = tensor.unflatten(0, (groups, -1))  # [ng, (np/ng + 2) hn, ...]
        parts = [part.flatten(0, 1) for part in grouped.split([n // groups for n in rows], dim=1)]
    else:
        parts = list(tensor[: sum(rows)].split(rows))
    return dict(zip(_names(key, arch), parts))


def _to_canonical(key: str, parts: list[torch.Tensor], arch: Arch) -> torch.Tensor:
    dim = _row_dim(key)
    if dim == "qkv":
        groups = _block(key, arch).num_query_groups
        grouped = [part.unflatten(0, (groups, -1)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)  # [(np + 2 ng) hn, ...]
    if dim == "vocab":
        parts = [*parts, parts[0].new_zeros(arch.padded_vocab_size - arch.vocab_size, arch.hidden_size)]
    return torch.cat(parts)


def _row_dim(key: str) -> str:
    dims = dims_of(key)
    assert dims is not None, key
    return dims[0]


def _block(key: str, arch: Arch) -> BlockArch:
    """Sizes of the layer that has this parameter."""
    layer, _ = split_key(key)
    assert layer is not None, key
    return arch.blocks[layer]


def _rows(key: str, arch: Arch) -> list[int]:
    """Rows of each Hugging Face weight of a key."""
    dim = _row_dim(key)
    if dim == "vocab":
        return [arch.vocab_size]
    if dim == "hidden":
        return [arch.hidden_size]
    block = _block(key, arch)
    if dim == "qkv":
        key_value = block.num_query_groups * arch.kv_channels
        return [arch.dim_size("heads", block), key_value, key_value]
    if dim == "gate_up" and arch.gated:
        return [block.ffn_hidden_size, block.ffn_hidden_size]
    return [arch.dim_size(dim, block)]


def _names(key: str, arch: Arch) -> list[str]:
    layer, suffix = split_key(key)
    names = NAMES[suffix]
    if _row_dim(key) == "gate_up" and not arch.gated:
        names = names[1:]
    return [name if layer is None else f"model.layers.{layer}.{name}" for name in names]


def asset_files(folder: Path) -> list[Path]:
    """config.json and what else belongs to a model beside its weights: tokenizer, generation settings, licence."""
    return sorted({path for pattern in ASSETS for path in folder.glob(pattern) if path.is_file()})


def special_tokens(file: Path) -> dict[int, str]:
    """Id -> token of a tokenizer.json, added tokens included."""
    content = _read_json(file)
    try:
        vocab = content["model"][
            "vocab"
        ]  # token -> id, or of a unigram model [token, score] in the order of the ids
        known = (
            {id: token for token, id in vocab.items()}
            if isinstance(vocab, dict)
            else {id: token for id, (token, _) in enumerate(vocab)}
        )
        return known | {added["id"]: added["content"] for added in content.get("added_tokens") or []}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{file} is no tokenizer of the tokenizers library ({error!r}); fetch it again"
        ) from error


def write_folder(
    folder: Path,
    source: Path,
    arch: Arch,
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write a model that transformers loads. Not atomic: give a folder that takes its place when it is whole.

    source: folder with the assets() of the model that this one came from. tensors: (checkpoint key, canonical tensor), one for
    each of arch.shapes(), in any order. Holds one shard and one tensor at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy_assets(source, folder, _new_config(_read_json(source / "config.json"), arch, dtype))
    shapes = arch.shapes()

    def named_tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for key, tensor in tensors:
            assert tensor.shape == shapes[key], (key, tensor.shape)
            yield from to_hf(key, tensor, arch).items()

    written = write_weights(folder, named_tensors(), dtype, max_shard_bytes=max_shard_bytes)
    assert written == hf_shapes(arch).keys(), written ^ hf_shapes(arch).keys()


def copy_assets(source: Path | None, folder: Path, config: dict[str, Any]) -> None:
    """The assets() of a source with another config.json."""
    for path in asset_files(source) if source else []:
        shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_weights(
    folder: Path,
    named: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    *,
    max_shard_bytes: float = 5e9,
) -> set[str]:
    """Hugging Face names and tensors -> safetensors files and their index, in a folder that has a config.json; the names."""
    shards = list(_write_shards(folder, named, dtype, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, (path, names, _) in enumerate(shards, 1):
        file = (
            f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
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
        config = {name: value for name, value in config.items() if name not in llama_only} | {
            "sliding_window": None
        }
    if config.get("layer_types"):
        config = config | {"layer_types": config["layer_types"][: arch.num_layers]}
    name = str(dtype).removeprefix("torch.")
    sizes = {key: getattr(arch, name) for name, key in config_fields(arch.family).items()}
    # torch_dtype is for transformers before 4.56.
    return (
        config
        | sizes
        | {
            "architectures": [FAMILIES[arch.family]],
            "model_type": arch.family,
            "dtype": name,
            "torch_dtype": name,
        }
    )


def _write_shards(
    folder: Path, named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, max_bytes: float
) -> Iterator[tuple[Path, list[str], int]]:
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
