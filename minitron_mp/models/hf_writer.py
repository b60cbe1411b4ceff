"""Write a Hugging Face folder: config.json, the side files of the source, and safetensors shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minitron_mp.models.arch import Arch
from minitron_mp.models.hf_config import new_config
from minitron_mp.models.hf_weights import hf_shapes, to_hf
from minitron_mp.models.model_folder import (
    INDEX,
    SINGLE_FILE,
    copy_asset_files,
    own_tokenizer_class,
    read_json,
    unknown_tokens,
)


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
    """Copy the asset_files() of a source without remote code, and write `config` as config.json."""
    if source:
        copy_asset_files(source, folder)
        tokenizer = folder / "tokenizer_config.json"
        if tokenizer.is_file():
            _rewrite(tokenizer, _tokenizer_changes(read_json(tokenizer)), removed=["extra_special_tokens"])
        settings = folder / "generation_config.json"
        if settings.is_file() and "vocab_size" in config:
            _rewrite(settings, unknown_tokens(read_json(settings), config["vocab_size"]))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _tokenizer_changes(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the changes to tokenizer_config.json with which transformers 4 and 5 load one tokenizer.

    transformers 5 writes the class TokenizersBackend and a list of extra_special_tokens, and
    transformers 4 rejects both. The older names work in both versions. A class in the folder's own
    Python code is replaced by the class that reads tokenizer.json.
    """
    changes: dict[str, Any] = {}
    given = settings.get("tokenizer_class")
    if given == "TokenizersBackend" or (given and own_tokenizer_class(settings)):
        changes["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):
        known = settings.get("additional_special_tokens") or []
        changes["additional_special_tokens"] = [*known, *(token for token in extra if token not in known)]
    elif extra is not None:
        changes["extra_special_tokens"] = extra  # a dictionary has the same meaning for both
    return changes


def _rewrite(file: Path, changes: dict[str, Any], removed: Sequence[str] = ()) -> None:
    """Change a JSON file, and remove the names of Python files, which the export does not contain."""
    content = read_json(file) if file.is_file() else {}
    new = {key: value for key, value in content.items() if key not in ("auto_map", *removed)} | changes
    if new != content:
        file.write_text(json.dumps(new, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard.path.rename(folder / file)
        weight_map |= dict.fromkeys(shard.names, file)
    if len(shards) > 1:
        total_size = sum(shard.num_bytes for shard in shards)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
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
