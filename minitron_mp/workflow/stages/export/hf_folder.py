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
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import DTYPES
from minitron_mp.models.families.export import exportable_arch
from minitron_mp.models.hf_weights import write_folder
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


def read_tensors(folder: Path, arch: Arch, world: World) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (checkpoint key, canonical tensor on the CPU) on rank 0, nothing on the other ranks.

    The tensors have the dtype of the checkpoint. Reading is collective, so all ranks must iterate
    to the end.
    """
    shapes = arch.shapes()
    dtypes = checkpoint_dtypes(folder)
    keys = list(shapes)
    while keys:
        batch: dict[str, torch.Tensor] = {}
        while keys and sum(tensor.nbytes for tensor in batch.values()) < READ_BYTES:
            key = keys.pop(0)
            batch[key] = torch.empty(shapes[key], dtype=dtypes[key])
        state = {key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in batch.items()}
        loaded = load_checkpoint(state if world.is_main else {}, folder)
        if world.is_main:
            yield from ((key, loaded[key]) for key in batch)
