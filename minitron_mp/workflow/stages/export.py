"""What each stage does once its inputs are there: read artefacts, compute, write one. pipeline.py decides whether and when.

Every function is reached by all ranks of the world and leaves its artefact whole or not at all.
"""

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
from minitron_mp.models.hf_weights import write_folder
from minitron_mp.pruning.target import exportable_arch
from minitron_mp.report.model_card import CARD, model_card
from minitron_mp.workflow.context import ASSETS, StageContext

READ_BYTES = 2e9
"""Tensors that export holds at a time."""


def export_student(job: StageContext) -> None:
    """Sharded checkpoint -> Hugging Face folder that transformers loads, with a model card."""
    arch = job.arch("distill")
    settings = job.recipe.export
    as_written = exportable_arch(arch, settings.family)
    dtype = DTYPES[settings.dtype or job.recipe.precision]
    tensors = read_tensors(job.paths["distill"], arch, job.world)
    failure: Exception | None = None
    check_room(arch.num_parameters() * dtype.itemsize if job.world.is_main else 0, job.output)
    try:
        if job.world.is_main:
            with writing_artifact(job.output, job.manifest.model_copy(update={"arch": as_written})) as folder:
                write_folder(folder, job.paths["import"] / ASSETS, as_written, dtype, tensors)
                card = model_card(
                    job.recipe, job.paths, job.manifest, as_written.family, job.paths["import"] / ASSETS
                )
                (folder / CARD).write_text(card, encoding="utf-8")
    except InputError as error:
        failure = error
    except (OSError, SafetensorError) as error:
        failure = InputError(f"{job.output} cannot be written: {error}")
    for (
        _
    ) in tensors:  # reading is collective: the other ranks, and rank 0 after a failure, walk it to the end
        pass
    raise_on_all_ranks(failure)


def read_tensors(folder: Path, arch: Arch, world: World) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (checkpoint key, canonical tensor on the CPU in the checkpoint's dtype) on rank 0, nothing elsewhere.

    All ranks must exhaust it, because reading is collective.
    """
    shapes, dtypes = arch.shapes(), checkpoint_dtypes(folder)
    keys = list(shapes)
    while keys:
        part: list[str] = []
        state: dict[str, ShardedTensor] = {}
        num_bytes = 0
        while keys and num_bytes < READ_BYTES:
            key = keys.pop(0)
            empty = torch.empty(shapes[key], dtype=dtypes[key])
            num_bytes += empty.nbytes
            part.append(key)
            if world.is_main:
                state[key] = ShardedTensor.from_rank_offsets(key, empty)
        loaded = load_checkpoint(state, folder)
        if world.is_main:
            for key in part:
                yield key, loaded[key]
