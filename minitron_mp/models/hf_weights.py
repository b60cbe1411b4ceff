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

from collections import Counter
from collections.abc import Collection, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch, BlockArch
from minitron_mp.models.families import FAMILIES
from minitron_mp.models.model_folder import INDEX, SINGLE_FILE, shortened, weight_files
from minitron_mp.models.parameters import EMBEDDING, HEAD, dims_of, split_key

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtype in a safetensors header -> dtype of torch."""

IGNORED = "rotary_emb.inv_freq"
"""End of the names of tensors that follow from config.json. Old models store them."""

PREFIXES = {
    "_orig_mod.": "torch.compile adds it; save the model that was compiled (model._orig_mod)",
    "module.": "DistributedDataParallel and DeepSpeed add it; save the inner model (model.module)",
    "base_model.model.": "peft adds it; save the result of merge_and_unload()",
}
"""Prefix of all weight names -> where it comes from, and how to save the model without it."""


class HFWeights:
    """The weights of a Hugging Face folder, read tensor by tensor.

    The constructor reads the headers only. InputError lists the tensors that are missing, unknown,
    or have a wrong shape or dtype.
    """

    def __init__(self, folder: Path, arch: Arch) -> None:
        self.folder = folder
        self.arch = arch
        self.files: dict[str, list[Any]] = {}
        """Name -> the open files that have the tensor. The first one is read."""
        weights = weight_files(folder)
        for path in weights.paths:
            file = _open(path)
            for name in list(file.keys()):
                copies = self.files.setdefault(name, [])
                copies.insert(0 if weights.named.get(name) == path.name else len(copies), file)
        dtypes = self._dtypes()
        # Quantized folders also have tensors with scales, whose names would hide the cause.
        refuse(f"the weights in {folder} have a dtype that cannot be read:", self._dtype_problems(dtypes))
        refuse(
            f"the weights in {folder} do not fit its config.json; give the one that was saved with them:",
            shortened(self._problems()),
        )
        self.dtype: torch.dtype = reduce(torch.promote_types, (DTYPES[name] for name in dtypes))
        """Dtype of the canonical tensors: the widest of the folder. So no value changes."""
        self.notes = self._notes(dtypes)
        """Sentences about what was converted or ignored, for the log."""

    def tensor(self, key: str) -> Tensor:
        """Return a canonical tensor on the CPU in `dtype`.

        InputError when a value is not finite, or when two files have different values for it.
        """
        parts = [self._read(self._stored_name(name)) for name in hf_names(key, self.arch)]
        if key == EMBEDDING and self.arch.tied:
            self._check_tied_head(parts[0])
        return _to_canonical(key, parts, self.arch).to(self.dtype)

    def _stored_name(self, name: str) -> str:
        """Return the name of the tensor in the files.

        A tied model may store its embedding under the name of the output layer only, as
        safetensors.torch.save_model does.
        """
        (embedding,) = hf_names(EMBEDDING, self.arch)
        (head,) = hf_names(HEAD, self.arch)
        is_under_head = self.arch.tied and name == embedding and name not in self.files
        return head if is_under_head and head in self.files else name

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
        tensor, *copies = (file.get_tensor(name) for file in self.files[name])
        # aminmax propagates NaN and reads the tensor once. isfinite of every value would allocate
        # several tensors of the same size.
        if not torch.stack(tensor.aminmax()).isfinite().all():
            count = tensor.numel() - int(tensor.isfinite().sum())
            raise InputError(
                f"{name} has {count:,} values of {tensor.numel():,} that are NaN or infinity; the file is "
                "damaged, or training diverged: download it again, or use an earlier checkpoint"
            )
        if not all(torch.equal(tensor, copy) for copy in copies):
            raise InputError(
                f"{name} is in {len(copies) + 1} files of {self.folder} with different values; "
                "delete the files that do not belong to the model, or download it again"
            )
        return tensor

    def _problems(self) -> list[str]:
        expected = hf_shapes(self.arch)
        if prefix_problem := _prefix_problem(self.files.keys(), expected.keys()):
            return [prefix_problem]
        (head,) = hf_names(HEAD, self.arch)
        problems = [
            _missing_problem(name, head, tied=self.arch.tied)
            for name in expected
            if self._stored_name(name) not in self.files
        ]
        if self.arch.tied:
            expected[head] = expected[hf_names(EMBEDDING, self.arch)[0]]  # some tied models store it
        for name, files in self.files.items():
            if name not in expected:
                if not name.endswith(IGNORED):
                    problems.append(f"{name} is not a weight of a {self.arch.family} with this config.json")
                continue
            for file in files:
                problems += _header_problems(name, file.get_slice(name), expected[name])
        return problems

    def _dtypes(self) -> Counter[str]:
        """Return dtype -> number of the used tensors that have it. Missing tensors are left out."""
        return Counter(self.files[name][0].get_slice(name).get_dtype() for name in self._used_names())

    def _used_names(self) -> list[str]:
        """Return the names of the used tensors in the files."""
        names = {self._stored_name(name) for name in hf_shapes(self.arch)}
        return sorted(names & self.files.keys())

    def _dtype_problems(self, dtypes: Counter[str]) -> list[str]:
        return [
            f"{count:,} of {dtypes.total():,} tensors are {name}, for example {self._example(name)}; "
            f"supported: {', '.join(DTYPES)}; load the model with transformers as one of these, and save it "
            "again"
            for name, count in sorted(dtypes.items())
            if name not in DTYPES
        ]

    def _example(self, dtype: str) -> str:
        """Return the name of a used tensor that has a dtype."""
        used = self._used_names()
        return next(name for name in used if self.files[name][0].get_slice(name).get_dtype() == dtype)

    def _notes(self, dtypes: Counter[str]) -> list[str]:
        notes = []
        if len(dtypes) > 1:
            counts = ", ".join(f"{count:,} of {name}" for name, count in sorted(dtypes.items()))
            widest = str(self.dtype).removeprefix("torch.")
            notes.append(
                f"the tensors have different dtypes ({counts}); all are stored as {widest}, which changes no "
                "value"
            )
        if (self.folder / SINGLE_FILE).is_file() and (self.folder / INDEX).is_file():
            notes.append(f"{INDEX} is ignored, because {SINGLE_FILE} exists")
        return notes


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


def _open(path: Path) -> Any:
    try:
        path.open("rb").close()  # safetensors reports a file without permission as missing
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise InputError(
            f"{path} is damaged or not a safetensors file ({error}); download it again"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check that you may read it") from error


def _prefix_problem(names: Collection[str], expected: Collection[str]) -> str:
    """Return one problem if the names have a prefix too many or too few, else ""."""
    anchor = max(expected, key=len)  # a name of a layer, which no other name contains
    found = [name for name in names if name.endswith(anchor)]
    if len(found) == 1 and found[0] != anchor:
        prefix = found[0].removesuffix(anchor)
        count = sum(name.startswith(prefix) for name in names)
        advice = PREFIXES.get(prefix, "rename the tensors, or save the model inside without it")
        return (
            f"{count:,} of {len(names):,} weight names begin with {prefix!r} (for example {found[0]}), which "
            f"is not part of this family's names: {advice} with save_pretrained()"
        )
    short = anchor.removeprefix("model.")
    if short in names and anchor not in names:
        return (
            f"the weight names lack the prefix 'model.' (for example {short}): the folder has the decoder "
            "without its output layer; save the complete model, such as AutoModelForCausalLM, with "
            "save_pretrained()"
        )
    return ""


def _missing_problem(name: str, head: str, *, tied: bool) -> str:
    if name == head and not tied:
        return (
            f"{name} is missing; if the output layer shares the embedding, set tie_word_embeddings to true "
            "in config.json"
        )
    return f"{name} is missing"


def _header_problems(name: str, header: Any, expected: tuple[int, ...]) -> list[str]:
    shape = tuple(header.get_shape())
    if shape != expected:
        hint = ""
        if 0 in shape:
            hint = "; an empty tensor is what DeepSpeed ZeRO-3 saves unless it gathers the weights"
        return [f"{name} has shape {shape}, config.json requires {expected}{hint}"]
    return []
