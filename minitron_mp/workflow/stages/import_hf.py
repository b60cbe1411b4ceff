"""The stage import: a Hugging Face folder becomes a sharded checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_mp.workflow.settings import model_files
from minitron_mp.workflow.stage import Stage

if TYPE_CHECKING:
    from minitron_mp.workflow.context import StageContext


def run(context: StageContext) -> None:
    """Convert the folder of the recipe's model."""
    import_folder(context, Path(context.recipe.model))


def import_folder(context: StageContext, source: Path) -> None:
    """Convert a Hugging Face folder, in the dtype of its weights.

    Each rank converts every world-size-th layer.
    """
    import torch.distributed as dist
    from megatron.core.dist_checkpointing import ShardedTensor

    from minitron_mp.artifacts.checkpoint import save_checkpoint
    from minitron_mp.console import Tracker
    from minitron_mp.distributed.sync import raise_on_all_ranks
    from minitron_mp.errors import InputError
    from minitron_mp.models.hf_config import read_arch
    from minitron_mp.models.hf_weights import HFWeights, asset_files
    from minitron_mp.models.parameters import split_key
    from minitron_mp.report.model_card import CARD, source_card
    from minitron_mp.workflow.context import ASSETS

    arch = read_arch(source)
    source_card(source)  # raises for a model card that the export could not read hours later
    weights = HFWeights(source, arch)
    keys = [
        key for key in arch.shapes() if (split_key(key)[0] or 0) % dist.get_world_size() == dist.get_rank()
    ]
    state = {}
    failure: Exception | None = None
    try:
        with Tracker(context.manifest.stage, len(keys), "tensors") as tracker:
            for key in keys:
                state[key] = ShardedTensor.from_rank_offsets(key, weights.tensor(key))
                tracker.advance(1)
    except InputError as error:
        failure = error
    raise_on_all_ranks(failure)

    def copy_assets(folder: Path) -> None:
        (folder / ASSETS).mkdir()
        for path in asset_files(source):
            shutil.copy(path, folder / ASSETS)
        if (source / CARD).is_file():  # not in the fingerprint: a model card changes no model
            shutil.copy(source / CARD, folder / ASSETS)

    save_checkpoint(state, context.output, context.manifest.model_copy(update={"arch": arch}), copy_assets)


IMPORT = Stage(
    name="import",
    help="Convert a Hugging Face folder to a sharded checkpoint.",
    artifact="teacher",
    sources=lambda recipe: model_files(recipe.model),
    run=run,
)
