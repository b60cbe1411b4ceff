"""Write the distilled student as a Hugging Face folder that transformers loads, with a model card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors import SafetensorError

from minitron_mp.artifacts.checkpoint import check_room, checkpoint_dtypes, load_checkpoint
from minitron_mp.artifacts.manifest import writing_artifact
from minitron_mp.distributed.sync import raise_on_all_ranks
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.models.arch import AXES, Arch
from minitron_mp.models.build import DTYPES
from minitron_mp.models.hf_weights import canonical_keys, write_folder
from minitron_mp.pruning.target import exportable_arch
from minitron_mp.report.model_card import CARD, model_card
from minitron_mp.workflow.context import ASSETS, StageContext

READ_BYTES = 2e9
"""Bytes of tensors that export holds at a time."""


def export_student(context: StageContext) -> None:
    """Write the folder on rank 0. Reading the sharded checkpoint is collective, so all ranks take part."""
    arch = context.arch("distill")
    settings = context.recipe.export
    exported = exportable_arch(arch, settings.family)
    dtype = DTYPES[settings.dtype or context.recipe.precision]
    assets = context.paths["import"] / ASSETS
    tensors = read_tensors(context.paths["distill"], arch, context.world)
    is_main = context.world.is_main
    check_room(arch.num_parameters() * dtype.itemsize if is_main else 0, context.output)
    failure: Exception | None = None
    try:
        if is_main:
            manifest = context.manifest.model_copy(update={"arch": exported})
            with writing_artifact(context.output, manifest) as folder:
                write_folder(folder, assets, exported, dtype, tensors)
                card = model_card(context.recipe, context.paths, context.manifest, exported.family, assets)
                (folder / CARD).write_text(card, encoding="utf-8")
    except InputError as error:
        failure = error
    except (OSError, SafetensorError) as error:
        failure = InputError(f"{context.output} cannot be written: {error}")
    # The other ranks, and rank 0 after a failure, read to the end: reading is collective.
    for _ in tensors:
        pass
    raise_on_all_ranks(failure)


def read_tensors(folder: Path, arch: Arch, world: World) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """(key, layer, canonical tensor on the CPU in the checkpoint's dtype) on rank 0, nothing elsewhere; reached by all ranks."""
    keys, shapes, dtypes = list(canonical_keys(arch)), arch.shapes(), checkpoint_dtypes(folder)
    while keys:
        part: dict[str, tuple[str, int | None]] = {}
        state, num_bytes = {}, 0
        while keys and num_bytes < READ_BYTES:
            key, layer = keys.pop(0)
            empty = torch.empty(shapes[key][layer is not None :], dtype=dtypes[key])
            num_bytes += empty.nbytes
            part[f"{key}/{layer}"] = (key, layer)
            if world.is_main:
                state[f"{key}/{layer}"] = sharded_tensor(key, layer, empty, arch)
        loaded = load_checkpoint(state, folder)
        if world.is_main:
            for name, (key, layer) in part.items():
                yield key, layer, loaded[name]


def sharded_tensor(key: str, layer: int | None, tensor: torch.Tensor, arch: Arch) -> ShardedTensor:
    """A canonical tensor as the whole of its key, or as one layer of it."""
    if AXES[key][0] != "layer":
        return ShardedTensor.from_rank_offsets(key, tensor)
    return ShardedTensor.from_rank_offsets(key, tensor, (0, layer, arch.num_layers), prepend_axis_num=1)
