"""What each stage does once its inputs are there: read artefacts, compute, write one. pipeline.py decides whether and when.

Every function is reached by all ranks of the world and leaves its artefact whole or not at all.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from minitron_mp.artifacts.checkpoint import save_checkpoint
from minitron_mp.console import Tracker
from minitron_mp.distributed.sync import raise_on_all_ranks
from minitron_mp.errors import InputError
from minitron_mp.models.hf_config import read_arch
from minitron_mp.models.hf_weights import Weights, asset_files
from minitron_mp.models.parameters import split_key
from minitron_mp.report.model_card import CARD, source_card
from minitron_mp.workflow.context import ASSETS, StageContext


def import_hf(job: StageContext) -> None:
    """Hugging Face folder -> sharded checkpoint, in the folder's dtype. Each rank converts every world-size-th layer."""
    source = Path(job.recipe.model if job.manifest.stage == "import" else job.recipe.teacher.model or "")
    arch = read_arch(source)
    source_card(source)  # refused now, not by the export hours later
    weights, mine = Weights(source, arch), {}
    keys = [
        key for key in arch.shapes() if (split_key(key)[0] or 0) % dist.get_world_size() == dist.get_rank()
    ]
    failure: Exception | None = None
    try:
        with Tracker(job.manifest.stage, len(keys), "tensors") as tracker:
            for key in keys:
                mine[key] = ShardedTensor.from_rank_offsets(key, weights.tensor(key))
                tracker.advance(1)
    except InputError as error:
        failure = error
    raise_on_all_ranks(failure)

    def copy_assets(folder: Path) -> None:
        (folder / ASSETS).mkdir()
        for path in (
            asset_files(source) + [source / CARD] * (source / CARD).is_file()
        ):  # the card changes no model: no fingerprint has it
            shutil.copy(path, folder / ASSETS)

    save_checkpoint(mine, job.output, job.manifest.model_copy(update={"arch": arch}), copy_assets)
