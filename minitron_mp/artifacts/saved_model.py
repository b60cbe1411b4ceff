"""Load a model from an artifact folder, and save one as an artifact folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron_mp import __version__
from minitron_mp.artifacts.checkpoint import load_weights, model_state, save_checkpoint
from minitron_mp.artifacts.files import ASSETS
from minitron_mp.artifacts.hf_folder import copy_assets_from
from minitron_mp.artifacts.manifest import Manifest, find_manifest, require_format
from minitron_mp.config.training import TrainingConfig
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.models.sharded_model import ShardedModel


def load_model(
    folder: str | Path,
    world: World,
    *,
    sequence_length: int,
    precision: str = "bf16",
    training: TrainingConfig | None = None,
    transformer_impl: str = "auto",
    fp8: str | None = None,
) -> ShardedModel:
    """Load and return the model in an artifact folder, with any parallel layout.

    Reached by all ranks. build_model() documents the options. training: the settings of a run that
    will train the model. InputError when the folder contains no model, or when the layout does not
    fit it.
    """
    folder = Path(folder)
    model = build_model(
        saved_arch(folder),
        world,
        ModelOptions(
            precision=precision,
            sequence_length=sequence_length,
            training=training,
            transformer_impl=transformer_impl,
            fp8=fp8,
        ),
    )
    load_weights(model.chunks, folder, world)
    return replace(model, folder=folder)


def saved_arch(folder: Path) -> Arch:
    """Return the architecture of the model in an artifact folder. InputError without a model."""
    manifest = find_manifest(folder)
    if manifest is None or manifest.arch is None:
        raise InputError(
            f"{folder} is not a model of minitron-mp; give a folder that `minitron-mp import`, "
            "`minitron-mp prune` or `minitron-mp distill` wrote"
        )
    require_format(folder, manifest)
    return manifest.arch


def save_model(
    model: ShardedModel,
    folder: str | Path,
    *,
    made_from: Sequence[str | Path] = (),
    settings: Mapping[str, object] | None = None,
) -> Manifest:
    """Write a model as an artifact folder that load_model() reads, and return its manifest.

    Reached by all ranks. made_from: artifact folders whose fingerprints the manifest records, such
    as the teacher's. Default: the folder that the model was loaded from. The Hugging Face side
    files, which export_hf() needs, are copied from the first folder that has them. settings:
    further values to record, such as those of the training. An older artifact is replaced when the
    new one is complete.
    """
    if not made_from and model.folder is not None:
        made_from = [model.folder]
    state = model_state(model.chunks, model.world)
    return save_state(state, model.arch, folder, made_from=made_from, settings=settings)


def save_state(
    state: dict[str, Any],
    arch: Arch,
    folder: str | Path,
    *,
    made_from: Sequence[str | Path] = (),
    settings: Mapping[str, object] | None = None,
) -> Manifest:
    """Write a sharded state, such as the result of prune(), as an artifact folder.

    The arguments and the result are those of save_model().
    """
    inputs = fingerprints(made_from)
    manifest = Manifest(
        stage="model",
        settings=dict(settings or {}),
        inputs=inputs,
        arch=arch,
        made_by=f"minitron_mp {__version__}",
    )
    with_assets = next((Path(path) for path in made_from if (Path(path) / ASSETS).is_dir()), None)
    copy_assets = None if with_assets is None else copy_assets_from(with_assets)
    save_checkpoint(state, Path(folder), manifest, copy_assets)
    return manifest


def fingerprints(folders: Sequence[str | Path]) -> dict[str, str]:
    """Return artifact folder -> fingerprint, read by rank 0; reached by all ranks.

    InputError for a folder that is not an artifact.
    """
    return on_rank_0(lambda: {str(path): _fingerprint(Path(path)) for path in folders})


def _fingerprint(folder: Path) -> str:
    manifest = find_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder} is not an artifact of minitron-mp; leave it out of made_from")
    return manifest.fingerprint
