"""Convert between the weights of a Hugging Face folder and canonical tensors.

A canonical tensor is the tensor of one checkpoint key (parameters.py) in Megatron-Core's layout.
Its vocabulary is padded by zero rows. The family (families/) defines the weight names. This module
imports neither megatron nor transformers. It reads and writes weights with safetensors.

    h hidden  f ffn  v padded vocabulary  np heads  ng query groups  hn head width  L layers

Rows with 4 heads in 2 groups. Each name stands for hn rows:
    Hugging Face  q_proj: q0 q1 q2 q3   k_proj: k0 k1   v_proj: v0 v1
    canonical     linear_qkv: q0 q1 k0 v0  q2 q3 k1 v1
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch, BlockArch
from minitron_mp.models.families import FAMILIES
from minitron_mp.models.hf_config import new_config, read_json, weight_files
from minitron_mp.models.parameters import EMBEDDING, HEAD, dims_of, split_key

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

ASSETS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "tekken.json",
    "LICENSE*",
    "NOTICE*",
)
"""Patterns of the files of a model that are not weights."""


class HFWeights:
    """The weights of a Hugging Face folder, read tensor by tensor.

    The constructor reads the headers only. InputError lists every tensor that is missing, unknown,
    or has a wrong shape or dtype.
    """

    def __init__(self, folder: Path, arch: Arch) -> None:
        self.arch = arch
        self.files: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file = safe_open(path, "pt")
            except SafetensorError as error:
                raise InputError(
                    f"{path} is damaged or not a safetensors file ({error}); download it again"
                ) from error
            self.files |= dict.fromkeys(file.keys(), file)
        refuse(f"the weights in {folder} do not fit its config.json:", self._problems())

    def tensor(self, key: str) -> Tensor:
        """Return a canonical tensor on the CPU, in the dtype of the file.

        InputError when a value is not finite.
        """
        parts = [self._read(name) for name in hf_names(key, self.arch)]
        if key == EMBEDDING and self.arch.tied:
            self._check_tied_head(parts[0])
        return _to_canonical(key, parts, self.arch)

    def _check_tied_head(self, embedding: Tensor) -> None:
        # transformers 4 uses the embedding as output layer, transformers 5 unties the two.
        (name,) = hf_names(EMBEDDING, self.arch)
        (head,) = hf_names(HEAD, self.arch)
        if head in self.files and not torch.equal(embedding, self._read(head)):
            raise InputError(
                f"tie_word_embeddings is true, but {head} differs from {name}; "
                f"set it to false in config.json to use {head}, or delete that weight"
            )

    def _read(self, name: str) -> Tensor:
        tensor = self.files[name].get_tensor(name)
        # aminmax propagates NaN and reads the tensor once. isfinite of every value would allocate
        # several tensors of the same size.
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise InputError(
                f"{name} contains NaN or infinity; the file is damaged, or training diverged: download it "
                "again, or use an earlier checkpoint"
            )
        return tensor

    def _problems(self) -> list[str]:
        expected = hf_shapes(self.arch)
        ignored = {*hf_names(HEAD, self.arch)}  # some tied models store it
        problems = [f"{name} is missing" for name in expected if name not in self.files]
        for name, file in self.files.items():
            header = file.get_slice(name)
            shape, dtype = tuple(header.get_shape()), header.get_dtype()
            if name not in expected:
                if name not in ignored and not name.endswith("rotary_emb.inv_freq"):
                    problems.append(f"{name} is not a weight of a {self.arch.family} with this config.json")
            elif shape != expected[name]:
                problems.append(f"{name} has shape {shape}, config.json requires {expected[name]}")
            elif dtype not in DTYPES:
                problems.append(f"{name} has dtype {dtype}; supported: {', '.join(DTYPES)}")
        return problems


def check_weights(folder: Path, arch: Arch) -> None:
    """Raise InputError that lists every missing, unknown or wrong tensor. It reads no data."""
    HFWeights(folder, arch)


def hf_names(key: str, arch: Arch) -> list[str]:
    """Return the names of the Hugging Face weights that hold the rows of a canonical tensor."""
    layer, name = split_key(key)
    prefix = "" if layer is None else f"model.layers.{layer}."
    return [prefix + part for part in FAMILIES[arch.family].weights[name]]


def hf_shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every Hugging Face weight, without padding of the vocabulary."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, shape in arch.shapes().items():
        names, rows = hf_names(key, arch), _rows(key, arch)
        assert len(names) == len(rows), f"{arch.family} maps {key} to {names}; it needs {len(rows)} weights"
        shapes |= {name: (count, *shape[1:]) for name, count in zip(names, rows)}
    return shapes


def to_hf(key: str, tensor: Tensor, arch: Arch) -> dict[str, Tensor]:
    """Return Hugging Face name -> tensor of a canonical tensor, as views if possible."""
    rows = _rows(key, arch)
    parts: Sequence[Tensor]
    if _row_dim(key) == "qkv":
        groups = _block(key, arch).num_query_groups
        grouped = tensor.unflatten(0, (groups, -1))  # [ng, (np/ng + 2) hn, ...]
        parts = [part.flatten(0, 1) for part in grouped.split([n // groups for n in rows], dim=1)]
    else:
        parts = tensor[: sum(rows)].split(rows)
    return dict(zip(hf_names(key, arch), parts))


def _to_canonical(key: str, parts: list[Tensor], arch: Arch) -> Tensor:
    dim = _row_dim(key)
    if dim == "qkv":
        groups = _block(key, arch).num_query_groups
        grouped = [part.unflatten(0, (groups, -1)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)  # [(np + 2 ng) hn, ...]
    if dim == "vocab":
        padding = arch.padded_vocab_size - arch.vocab_size
        parts = [*parts, parts[0].new_zeros(padding, arch.hidden_size)]
    return torch.cat(parts)


def _row_dim(key: str) -> str:
    dims = dims_of(key)
    assert dims is not None, key
    return dims[0]


def _block(key: str, arch: Arch) -> BlockArch:
    """Return the sizes of the layer that has this parameter."""
    layer, _ = split_key(key)
    assert layer is not None, key
    return arch.blocks[layer]


def _rows(key: str, arch: Arch) -> list[int]:
    """Return the number of rows of each Hugging Face weight of a key."""
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


def asset_files(folder: Path) -> list[Path]:
    """Return config.json, tokenizer, generation settings and licence files of a model folder."""
    return sorted({path for pattern in ASSETS for path in folder.glob(pattern) if path.is_file()})


def special_tokens(file: Path) -> dict[int, str]:
    """Return id -> token of a tokenizer.json, added tokens included."""
    content = read_json(file)
    try:
        # token -> id, or of a unigram model [token, score] in the order of the ids
        vocab = content["model"]["vocab"]
        if isinstance(vocab, dict):
            tokens = {id: token for token, id in vocab.items()}
        else:
            tokens = {id: token for id, (token, _) in enumerate(vocab)}
        return tokens | {added["id"]: added["content"] for added in content.get("added_tokens") or []}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{file} is not a file of the tokenizers library ({error!r}); download it again"
        ) from error


def write_folder(
    folder: Path,
    source: Path,
    arch: Arch,
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write a model that transformers loads. It is not atomic, so use a temporary folder.

    source: folder with the asset_files() of the model that this one was made from. tensors:
    (checkpoint key, canonical tensor) for each key of arch.shapes(), in any order. Memory holds one
    shard and one tensor at a time.
    """
    shapes = arch.shapes()

    def hf_tensors() -> Iterator[tuple[str, Tensor]]:
        for key, tensor in tensors:
            assert tensor.shape == shapes[key], (key, tensor.shape)
            yield from to_hf(key, tensor, arch).items()

    folder.mkdir(parents=True, exist_ok=True)
    config = new_config(read_json(source / "config.json"), arch, str(dtype).removeprefix("torch."))
    copy_assets(source, folder, config)
    written = write_weights(folder, hf_tensors(), dtype, max_shard_bytes=max_shard_bytes)
    assert written == hf_shapes(arch).keys(), written ^ hf_shapes(arch).keys()


def copy_assets(source: Path | None, folder: Path, config: dict[str, Any]) -> None:
    """Copy the asset_files() of a source, and write `config` as config.json."""
    for path in asset_files(source) if source else []:
        shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    *,
    max_shard_bytes: float = 5e9,
) -> set[str]:
    """Write (Hugging Face name, tensor) pairs as safetensors files with an index; return the names.

    The folder must have a config.json.
    """
    shards = list(_write_shards(folder, tensors, dtype, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard.path.rename(folder / file)
        weight_map |= dict.fromkeys(shard.names, file)
    if len(shards) > 1:
        total_size = sum(shard.num_bytes for shard in shards)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    return set(weight_map)


@dataclass(frozen=True)
class _Shard:
    """A written file with a temporary name."""

    path: Path
    names: list[str]
    num_bytes: int


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, max_bytes: float
) -> Iterator[_Shard]:
    """Write the tensors file by file, and yield each written shard."""
    shard: dict[str, Tensor] = {}
    num_bytes = number = 0

    def save() -> _Shard:
        path = folder / f".shard-{number}"
        save_file(shard, path, metadata={"format": "pt"})
        # safetensors makes the file readable for the owner only.
        shutil.copymode(folder / "config.json", path)
        return _Shard(path, list(shard), num_bytes)

    for name, tensor in tensors:
        size = tensor.numel() * dtype.itemsize
        if shard and num_bytes + size > max_bytes:
            yield save()
            shard, num_bytes, number = {}, 0, number + 1
        # copy=True, because safetensors rejects views that share storage.
        shard[name] = tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        num_bytes += size
    yield save()
