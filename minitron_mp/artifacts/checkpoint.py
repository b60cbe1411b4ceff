"""Megatron-Core's sharded checkpoints as artifacts.

A checkpoint is written completely or not at all. It loads with any parallel layout. Each layer has
separate keys (models/parameters.py).
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

from minitron_mp.artifacts.checkpoint_errors import discard, read_errors, write_errors
from minitron_mp.artifacts.files import aside_path
from minitron_mp.artifacts.manifest import Manifest, commit_artifact, prepare_artifact
from minitron_mp.artifacts.writer_processes import forked_writers
from minitron_mp.distributed.process_groups import host_group
from minitron_mp.distributed.sync import on_rank_0, raise_on_all_ranks
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.models.parameters import EMBEDDING, HEAD

FREE_SPACE_MARGIN = 1.1
"""Free space that a save needs, relative to the bytes of its tensors."""

# Since 0.17 Megatron prefers nvidia-resiliency-ext, which only GPU containers have. All versions
# include the writers "mcore".
HAS_ASYNC_STRATEGY = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
WRITER_OPTIONS = {"async_strategy": "mcore"} if HAS_ASYNC_STRATEGY else {}

EXTRA_STATE = "_extra_state"
"""End of the keys of objects that Megatron and Transformer Engine add to layers, for FP8 scales."""


def model_state(chunks: list[Any], world: World) -> dict[str, Any]:
    """Return the sharded state of this rank's chunks. Its keys do not depend on the layout.

    The extra state is left out, because only delayed scaling needs it; see scaling_state().
    """
    state: dict[str, Any] = {}
    for number, chunk in enumerate(chunks):
        entries = chunk.sharded_state_dict(metadata=_metadata(world))
        state[f"model{number}"] = {
            key: entry for key, entry in entries.items() if not key.endswith(EXTRA_STATE)
        }
    return state


def scaling_state(chunks: list[Any], world: World) -> dict[str, Any]:
    """Return the histories of largest values for delayed FP8 scaling, {} without delayed scaling.

    They are part of the checkpoints of a run. Their keys do not depend on the layout.
    Tensor-parallel and data-parallel ranks hold the same values.
    """
    state: dict[str, Any] = {}
    for number, chunk in enumerate(chunks):
        if not chunk.config.fp8 or chunk.config.fp8_recipe != "delayed":
            continue
        entries = chunk.sharded_state_dict(metadata=_metadata(world))
        state[f"scaling{number}"] = {
            key: entry for key, entry in entries.items() if "linear" in key and key.endswith(EXTRA_STATE)
        }
    return state


def _metadata(world: World) -> dict[str, Any]:
    """Return the options of Megatron's sharded_state_dict().

    non_homogeneous_layers gives each layer separate keys, instead of one tensor for all layers.
    """
    return {"dp_cp_group": world.groups.dp_cp, "non_homogeneous_layers": True}


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Add a prefix to all checkpoint keys in place, for a second model in one checkpoint."""
    add_prefix_for_sharding(state, prefix)
    return state


def load_weights(chunks: list[Any], folder: Path, world: World, prefix: str = "") -> None:
    """Load a checkpoint of any layout and dtype into the chunks; reached by all ranks.

    prefix: prefix of this model's keys in the checkpoint.
    """
    state = prefixed(model_state(chunks, world), prefix)
    for i, chunk in enumerate(chunks):
        if chunk.config.fp8_param:
            _read_into_new_tensors(state[f"model{i}"])
    state = load_checkpoint(state, folder)
    for i, chunk in enumerate(chunks):
        result = chunk.load_state_dict(state[f"model{i}"], strict=False)
        missing = [key for key in result.missing_keys if not key.endswith(EXTRA_STATE)]
        assert not missing, missing


def _read_into_new_tensors(state: dict[str, Any]) -> None:
    """Replace FP8 weights in the state by bf16 tensors on the CPU, which the checkpoint fills.

    load_state_dict() then quantises each weight once, as one tensor. Megatron-Core 0.19 would write
    the pieces of a weight separately (gate and up of a gated fc1, shards of a different layout),
    and a tensor with one scale would keep the scale of the last piece.
    """
    for entry in nested_values(state):
        entry.data = torch.empty(entry.data.shape, dtype=entry.data.dtype)


def vocabulary_shard(arch: Arch, tensor: torch.Tensor, world: World) -> ShardedTensor:
    """Return the sharded tensor of a rank's rows [v/tp, h] of the output layer.

    It is the state that load_checkpoint() fills, for ranks of the last pipeline stage.
    """
    key = EMBEDDING if arch.tied else HEAD
    groups = world.groups
    return ShardedTensor.from_rank_offsets(
        key, tensor, (0, groups.tp.rank(), groups.tp.size()), replica_id=groups.dp_cp.rank()
    )


def load_checkpoint(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill a sharded state from a checkpoint and return it; reached by all ranks.

    InputError if the checkpoint is damaged or belongs to a different model.
    """
    with read_errors(folder):
        return dist_checkpointing.load(state, str(folder))


def checkpoint_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Return checkpoint key -> dtype of every tensor. It reads the metadata only, on any rank."""
    with read_errors(folder):
        metadata = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    return {
        key: entry.properties.dtype
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def save_checkpoint(
    state: dict[str, Any], folder: Path, manifest: Manifest, extra: Callable[[Path], None] | None = None
) -> None:
    """Write a sharded state as an artifact; reached by all ranks.

    It replaces an older artifact after all files are written. extra: called on rank 0 with the
    temporary folder, to add small files. If the disk has too little space, every rank raises
    InputError before a file is written.
    """
    _prepare(state, folder)

    def finish() -> None:
        if extra is not None:
            extra(aside_path(folder))
        commit_artifact(folder, manifest)

    with write_errors(folder):
        with forked_writers():
            dist_checkpointing.save(state, str(aside_path(folder)), _save_strategy())
        on_rank_0(finish)


class AsyncCheckpointWriter:
    """Writes checkpoints while training continues, one at a time.

    Forked processes write a copy of the state at start(). Until finish() the files are in the
    temporary folder (files.aside_path), so a kill leaves no incomplete artifact. All ranks must
    call the methods. `writing` is a property of this rank alone.
    """

    def __init__(self) -> None:
        self.queue = AsyncCallsQueue()
        self.folder = Path()

    def start(
        self, state: dict[str, Any], folder: Path, manifest: Manifest, after: Callable[[], None]
    ) -> None:
        """Start to write an artifact like save_checkpoint(), and return when the state is copied.

        after: called on rank 0 when the artifact is complete.
        """
        self.finish()  # the queue may hold the calls of one checkpoint only
        _prepare(state, folder)
        self.folder = folder
        with write_errors(folder), forked_writers():
            request = dist_checkpointing.save(
                state, str(aside_path(folder)), _save_strategy(), async_sharded_save=True, **WRITER_OPTIONS
            )

            def finish() -> None:
                commit_artifact(folder, manifest)
                after()

            assert request is not None
            request.add_finalize_fn(lambda: on_rank_0(finish))
            self.queue.schedule_async_request(request)

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was started and not finished; the same on all ranks."""
        return self.queue.get_num_unfinalized_calls() > 0

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing."""
        return any(
            not call.async_caller.is_current_async_call_done(blocking=False, no_dist=True)
            for call in self.queue.async_calls
        )

    def finish(self) -> None:
        """Wait until the checkpoint is complete. InputError on every rank if writing failed."""
        with write_errors(self.folder):
            self.queue.maybe_finalize_async_calls(blocking=True)

    def abandon(self) -> None:
        """Stop this rank's writers after an error or an interrupt, and delete their files."""
        if not self.pending:
            return
        for call in self.queue.async_calls:
            call.async_caller.close(abort=True)
        self.queue.async_calls.clear()
        discard(self.folder)


def _save_strategy() -> FullyParallelSaveStrategyWrapper:
    """Return Megatron's strategy in which all ranks that hold a tensor share the writing."""
    return FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy())


def _prepare(state: dict[str, Any], folder: Path) -> None:
    """Check the free space and make the temporary folder."""
    # Files of a killed run would count against the free space.
    on_rank_0(lambda: shutil.rmtree(aside_path(folder), ignore_errors=True))
    check_room(sum(_written_bytes(entry) for entry in nested_values(state)), folder)
    on_rank_0(lambda: prepare_artifact(folder))


def check_room(num_bytes: float, folder: Path) -> None:
    """Raise InputError on every rank if the disk has less space than all ranks will write.

    num_bytes: bytes that this rank will write. The check comes before a save, because a full disk
    would stop the writer processes of some ranks only.
    """
    needed = torch.tensor(float(num_bytes))
    dist.all_reduce(needed, group=host_group())
    parent = next(path for path in folder.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    failure = None
    if needed.item() * FREE_SPACE_MARGIN > free:
        failure = InputError(
            f"{folder} needs up to {needed.item() / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB free; "
            "free some space or set another output"
        )
    raise_on_all_ranks(failure)


def _written_bytes(entry: Any) -> int:
    """Return the bytes of an entry that this rank writes, 0 unless it is the main replica."""
    data = getattr(entry, "data", None)
    return data.nbytes if isinstance(data, torch.Tensor) and is_main_replica(entry.replica_id) else 0
