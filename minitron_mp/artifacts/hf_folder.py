"""import_hf and export_hf: Hugging Face folder -> sharded checkpoint, and back.

A checkpoint artifact has a folder ASSETS with the side files of the original Hugging Face model:
config.json, tokenizer, model card. Each artifact made from it has a copy, so the student can be
exported without the original folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors import SafetensorError
from torch import Tensor

from minitron_mp import __version__
from minitron_mp.artifacts.checkpoint import check_room, checkpoint_dtypes, load_checkpoint, save_checkpoint
from minitron_mp.artifacts.files import ASSETS, CARD, fingerprint_files
from minitron_mp.artifacts.manifest import Manifest, require_artifact, writing_artifact
from minitron_mp.console import Tracker, say
from minitron_mp.distributed.sync import on_rank_0, raise_on_all_ranks
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.models.families.export import exportable_arch
from minitron_mp.models.hf_config import read_arch, unused_setting_notes
from minitron_mp.models.hf_weights import HFWeights
from minitron_mp.models.hf_writer import write_folder
from minitron_mp.models.model_folder import copy_asset_files, folder_notes, model_files
from minitron_mp.models.parameters import split_key
from minitron_mp.models.sharded_model import DTYPES

READ_BYTES = 2e9
"""Bytes of tensors that export_hf holds in memory at a time."""


def import_hf(source: str | Path, out: str | Path, manifest: Manifest | None = None) -> Arch:
    """Convert a Hugging Face folder to a checkpoint artifact and return the architecture.

    All weights are stored in the widest dtype of the folder, so that no value changes. The ranks
    share the layers; reached by all ranks. manifest: of the artifact. Default: a manifest with the
    fingerprint of the folder. InputError when the folder is not a model of a supported family.
    """
    source, out = Path(source), Path(out)
    arch = read_arch(source)
    if manifest is None:
        files = model_files(source)
        inputs = on_rank_0(lambda: {"model": fingerprint_files(files)})
        manifest = Manifest(stage="import", settings={}, inputs=inputs, made_by=f"minitron_mp {__version__}")
    weights = HFWeights(source, arch)
    for note in [*weights.notes, *folder_notes(source, arch.vocab_size), *unused_setting_notes(source)]:
        say(f"{source}: {note}")
    keys = [
        key for key in arch.shapes() if (split_key(key)[0] or 0) % dist.get_world_size() == dist.get_rank()
    ]
    state = {}
    failure: Exception | None = None
    try:
        with Tracker(manifest.stage, len(keys), "tensors") as tracker:
            for key in keys:
                state[key] = ShardedTensor.from_rank_offsets(key, weights.tensor(key))
                tracker.advance(1)
    except InputError as error:
        failure = error
    raise_on_all_ranks(failure)

    def copy_assets(folder: Path) -> None:
        (folder / ASSETS).mkdir()
        copy_asset_files(source, folder / ASSETS)
        if (source / CARD).is_file():  # a model card is not part of the fingerprint
            shutil.copy(source / CARD, folder / ASSETS)

    save_checkpoint(state, out, manifest.model_copy(update={"arch": arch}), copy_assets)
    return arch


def export_hf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    assets: Path | None = None,
    dtype: str | None = None,
    family: str | None = None,
    manifest: Manifest | None = None,
    model_card: Callable[[Arch], str] | None = None,
) -> None:
    """Write a checkpoint artifact as a Hugging Face folder that transformers loads.

    Rank 0 writes. Reading the sharded checkpoint is collective, so all ranks must call it. assets:
    folder with config.json and tokenizer. Default: the assets in the checkpoint. dtype: "bf16" or
    "fp32". Default: the dtype of the checkpoint. family: family to write, if it differs, such as
    mistral for a llama. model_card: exported architecture -> text of README.md. InputError when
    transformers would reject the model.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    source_manifest = require_artifact(checkpoint, "distill")
    assets = assets or checkpoint / ASSETS
    if source_manifest.arch is None or not (assets / "config.json").is_file():
        raise InputError(
            f"{checkpoint} has no model or no {ASSETS}/config.json; give a folder that `minitron-mp "
            "import`, `prune` or `distill` wrote, or pass assets=FOLDER with config.json and tokenizer"
        )
    arch = source_manifest.arch
    exported = exportable_arch(arch, family)
    if manifest is None:
        inputs = {"distill": source_manifest.fingerprint}
        manifest = Manifest(stage="export", settings={}, inputs=inputs, made_by=f"minitron_mp {__version__}")
    target_dtype = DTYPES[dtype] if dtype else checkpoint_dtypes(checkpoint)[next(iter(arch.shapes()))]
    tensors = read_tensors(checkpoint, arch)
    is_main = dist.get_rank() == 0
    check_room(arch.num_parameters() * target_dtype.itemsize if is_main else 0, out)
    failure: Exception | None = None
    try:
        if is_main:
            with writing_artifact(out, manifest.model_copy(update={"arch": exported})) as folder:
                write_folder(folder, assets, exported, target_dtype, tensors)
                if model_card is not None:
                    (folder / CARD).write_text(model_card(exported), encoding="utf-8")
    except InputError as error:
        failure = error
    except (OSError, SafetensorError) as error:
        failure = InputError(f"{out} cannot be written: {error}; check the disk, or set another output")
    # Reading is collective, so the other ranks, and rank 0 after a failure, read to the end.
    for _ in tensors:
        pass
    raise_on_all_ranks(failure)


def read_tensors(folder: Path, arch: Arch) -> Iterator[tuple[str, Tensor]]:
    """Yield (checkpoint key, canonical tensor on the CPU) on rank 0; other ranks yield no pair.

    The tensors have the dtype of the checkpoint. Reading is collective, so all ranks must iterate
    to the end.
    """
    shapes = arch.shapes()
    dtypes = checkpoint_dtypes(folder)
    is_main = dist.get_rank() == 0
    keys = list(shapes)
    while keys:
        batch: dict[str, Tensor] = {}
        while keys and sum(tensor.nbytes for tensor in batch.values()) < READ_BYTES:
            key = keys.pop(0)
            batch[key] = torch.empty(shapes[key], dtype=dtypes[key])
        state = {key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in batch.items()}
        loaded = load_checkpoint(state if is_main else {}, folder)
        if is_main:
            yield from ((key, loaded[key]) for key in batch)


def copy_assets_from(checkpoint: Path) -> Callable[[Path], None]:
    """Return a function that copies the Hugging Face side files into a new artifact folder."""

    def copy(folder: Path) -> None:
        shutil.copytree(checkpoint / ASSETS, folder / ASSETS)

    return copy
