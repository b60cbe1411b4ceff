"""Load a model from an artefact folder, and save one as an artefact folder."""

from __future__ import annotations

from pathlib import Path

from minitron_mp.artifacts.checkpoint import load_weights
from minitron_mp.artifacts.manifest import find_manifest
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import build_model
from minitron_mp.models.sharded_model import ShardedModel


def load_model(
    folder: str | Path,
    world: World,
    *,
    sequence_length: int,
    precision: str = "bf16",
    transformer_impl: str = "auto",
    fp8: str | None = None,
) -> ShardedModel:
    """Load the model in an artefact folder, at any parallel layout; reached by all ranks.

    The options are those of build_model(). InputError when the folder holds no model, or when the
    layout does not fit it.
    """
    folder = Path(folder)
    model = build_model(
        saved_arch(folder),
        world,
        precision=precision,
        sequence_length=sequence_length,
        transformer_impl=transformer_impl,
        fp8=fp8,
    )
    load_weights(model.chunks, folder, world)
    return model


def saved_arch(folder: Path) -> Arch:
    """Return the architecture of the model in an artefact folder; InputError when it holds none."""
    manifest = find_manifest(folder)
    if manifest is None or manifest.arch is None:
        raise InputError(
            f"{folder} is not a model of minitron-mp; give a folder that `minitron-mp import`, "
            "`minitron-mp prune` or `minitron-mp distill` wrote"
        )
    return manifest.arch
