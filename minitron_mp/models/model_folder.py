"""The files of a Hugging Face model folder: which there are, and why a folder cannot be read.

This file reads only JSON and file names and does not import torch, so it is fast on a laptop.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_mp.errors import InputError, refuse

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"

ASSETS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "tekken.json",
    "LICENSE*",
    "NOTICE*",
)
"""Patterns of the files of a model that are not weights."""

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "begins with a byte order mark",
    codecs.BOM_UTF16_LE: "is UTF-16 text",
    codecs.BOM_UTF16_BE: "is UTF-16 text",
}
"""First bytes of a text file -> what they mean. transformers reads UTF-8 without a mark only."""

OTHER_FORMATS = {
    "adapter_config.json": "a LoRA adapter; merge it into its model with merge_and_unload() of peft, and "
    "save that model",
    "*.gguf": "a GGUF model of llama.cpp; give the Hugging Face model that it was made from",
    "pytorch_model*.bin*": "pickled weights; load them with transformers and write them with "
    "save_pretrained(), which writes safetensors",
    "consolidated*": "the weights in the format of the model's authors; download the files named model-*",
    "*.distcp": "a sharded training checkpoint; convert it to a Hugging Face folder first",
}
"""File of a folder without safetensors weights of a model -> what the folder has instead."""


TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of config.json and generation_config.json with an id or a list of ids."""


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a model."""

    paths: list[Path]
    named: dict[str, str] = field(default_factory=dict)
    """Name of a weight -> file that the index names for it."""


def weight_files(folder: Path) -> WeightFiles:
    """Return the safetensors files of a model; none if the folder has none.

    model.safetensors is preferred to an index, as in transformers. InputError for a missing shard.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX
    if single.is_file():
        return WeightFiles([single])
    if not index.is_file():
        return WeightFiles([])
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} has no weight_map of weight names to files; download it again")
    shards = sorted({folder / name for name in weight_map.values()})
    missing = [path for path in shards if not path.is_file()]
    rows = [f"{path.name} is missing{_broken_link(path)}" for path in missing]
    refuse(f"{folder} is incomplete; download these files again:", shortened(rows))
    return WeightFiles(shards, weight_map)


def has_weights(folder: Path) -> bool:
    """Return whether a folder contains the weights of a model."""
    return bool(weight_files(folder).paths)


def asset_files(folder: Path) -> list[Path]:
    """Return config.json, tokenizer, generation settings and licence files of a model folder."""
    return sorted({path for pattern in ASSETS for path in folder.glob(pattern) if path.is_file()})


def model_files(folder: Path) -> list[Path]:
    """Return the files of a model that determine what is made of it."""
    weights = (path for path in folder.glob("*.safetensors") if path.is_file())
    return [*asset_files(folder), *weights]


def copy_asset_files(source: Path, folder: Path) -> None:
    """Copy the asset_files() of a folder into another folder; links become files."""
    for path in asset_files(source):
        copied = folder / path.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copied)


def folder_notes(folder: Path, vocab_size: int) -> list[str]:
    """Return sentences about settings of the side files that are not used, for the log."""
    notes = []
    for name in ("config.json", "generation_config.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        unknown = unknown_tokens(content, vocab_size)
        notes += [
            f"{key} of {name} is {content[key]}, but the ids are 0 to {vocab_size - 1}; the exported student "
            "will not have the other ids"
            for key in unknown
        ]
        if content.get("auto_map"):
            notes.append(
                f"the Python files that {name} names in auto_map are not used; the exported student is a "
                "model of transformers without own code"
            )
    if (folder / "adapter_config.json").is_file():
        notes.append(
            "adapter_config.json belongs to an adapter beside the weights, which is not used, although "
            "transformers with peft loads it from this folder; to compress the model with the adapter, "
            "merge it with merge_and_unload() of peft and save that model"
        )
    return notes


def own_tokenizer_class(settings: Mapping[str, Any]) -> str:
    """Return the class that tokenizer_config.json names in a Python file of the folder; "" for none.

    A class of transformers in the same file has priority, as in transformers.
    """
    auto_map = settings.get("auto_map")
    value = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    names = [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]
    classes = [name.rpartition(".")[2] for name in names]
    given = settings.get("tokenizer_class") or (classes[0] if classes else "")
    stems = {name.removesuffix("Fast") for name in classes}
    return str(given) if str(given).removesuffix("Fast") in stems else ""


def unknown_tokens(content: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return key -> its value without the ids that have no embedding, for each key with such ids."""
    changed: dict[str, Any] = {}
    for key in TOKEN_KEYS:
        value = content.get(key)
        ids = value if isinstance(value, list) else [value]
        known = [id for id in ids if not isinstance(id, int) or 0 <= id < vocab_size]
        if len(known) < len(ids):
            changed[key] = known if isinstance(value, list) and known else None
    return changed


def require_folder(folder: Path) -> None:
    """Raise InputError if there is no such folder. A name on the Hub gets the download command."""
    if folder.is_dir():
        if not os.access(folder, os.R_OK | os.X_OK):
            raise InputError(
                f"{folder} cannot be read (Permission denied); check that you may open the folder"
            )
        return
    needed = "a Hugging Face model folder: config.json, safetensors weights, tokenizer"
    if folder.exists():
        raise InputError(f"{folder} is not a folder but a file; give {needed}")
    if folder.is_symlink():
        raise InputError(f"{folder} is not a folder{_broken_link(folder)}; give {needed}")
    hint = ""
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(folder)) and not folder.parent.exists():
        local = folder.name
        hint = (
            f". If it is a model of the Hugging Face Hub, download it with "
            f"`hf download {folder} --local-dir {local}` and give that folder"
        )
    raise InputError(f"{folder} is not a folder; give {needed}{hint}")


def missing_weights_problem(folder: Path) -> str:
    """Return the problem of a folder without safetensors weights."""
    text = f"no {SINGLE_FILE} or {INDEX}; write them with save_pretrained of transformers"
    for name in (SINGLE_FILE, INDEX):
        if (folder / name).is_symlink():
            return f"{name} cannot be read{_broken_link(folder / name)}; download the model again"
    stray = _stray_weights(folder)
    if any(re.search(r"-\d+-of-\d+\.", name) for name in stray):
        return f"{', '.join(shortened(stray))}: the index of these files, {INDEX}, is missing; download it"
    if stray:
        return (
            f"the folder has {', '.join(shortened(stray))}, but no {SINGLE_FILE} or {INDEX}; rename the file "
            f"with all weights to {SINGLE_FILE}, or download the model again"
        )
    return text + _other_format(folder)


def has_other_weights(folder: Path) -> bool:
    """Return whether a folder has weights, but not under the names that are read."""
    return not has_weights(folder) and bool(_stray_weights(folder) or _other_format(folder))


def _stray_weights(folder: Path) -> list[str]:
    """Return the names of safetensors files that are neither an adapter nor in another format."""
    paths = (path for path in folder.glob("*.safetensors") if path.is_file())
    return sorted(path.name for path in paths if not path.name.startswith(("adapter_", "consolidated")))


def missing_config_problem(folder: Path) -> str:
    """Return the problem of a folder without config.json."""
    if (folder / "config.json").is_symlink():
        return f"config.json cannot be read{_broken_link(folder / 'config.json')}; download the model again"
    return "no config.json" + _other_format(folder)


def subfolder_problem(folder: Path) -> str:
    """Return which subfolders of a folder without config.json have one, as advice; "" without one.

    They are the snapshots in a cache of the Hub, and the checkpoints of a training run.
    """
    found = sorted({file.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/config.json")})
    if not found:
        return ""
    names = ", ".join(shortened([str(path) for path in found]))
    return f"no config.json, but a subfolder has one; give {'it' if len(found) == 1 else 'one'}: {names}"


def asset_problems(folder: Path) -> list[str]:
    """Return the side files that transformers cannot read: broken links, JSON and text not in UTF-8."""
    broken = (
        path
        for pattern in ASSETS
        for path in sorted(folder.glob(pattern))
        if path.is_symlink() and not path.exists()
    )
    problems = [f"{path.name} cannot be read{_broken_link(path)}; download it again" for path in broken]
    for path in asset_files(folder):
        try:
            if path.suffix == ".json" and path.name != "config.json":  # config.json was read before
                read_json(path)
            elif path.suffix == ".jinja" or path.name == "merges.txt":
                _read_text(path)
        except InputError as error:
            problems.append(str(error))
    return problems


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


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that contains an object. InputError if it is damaged."""
    content = _parse_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} contains {type(content).__name__}, not keys and values; download it again")
    return content


def _parse_json(path: Path) -> Any:
    """Return the content of a JSON file in UTF-8. InputError if it cannot be read."""
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is damaged ({error}); JSON is UTF-8 text without comments and trailing commas: correct "
            "it, or download it again"
        ) from error


def _read_text(path: Path) -> str:
    """Return the content of a text file in UTF-8. InputError if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}); check that the file exists and that you may "
            "read it"
        ) from error
    for mark, meaning in BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            raise InputError(
                f"{path} {meaning}, which transformers cannot read; save it as UTF-8 without byte order mark"
            )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is damaged or not UTF-8 text ({error}); save it as UTF-8, or download it again"
        ) from error


def shortened(rows: list[str], most: int = 8) -> list[str]:
    """Return the first rows, and a last row with the number of the others."""
    if len(rows) <= most + 1:
        return rows
    return [*rows[:most], f"and {len(rows) - most:,} more"]


def _other_format(folder: Path) -> str:
    return next((f". The folder has {text}" for text in _formats(folder)), "")


def _formats(folder: Path) -> Iterator[str]:
    for pattern, text in OTHER_FORMATS.items():
        if any(folder.glob(pattern)):
            yield text


def _broken_link(path: Path) -> str:
    """Return words about a link whose target is missing, or ""."""
    if not path.is_symlink() or path.exists():
        return ""
    return f": it is a link to {path.readlink()}, which does not exist"
