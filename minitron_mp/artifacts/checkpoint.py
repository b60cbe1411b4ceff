"""Megatron sharded checkpoints as artefacts: written whole or not at all, loaded at any layout."""

from __future__ import annotations

import inspect
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, TensorStorageMetadata

from minitron_mp.artifacts.files import aside_path
from minitron_mp.artifacts.manifest import Manifest, commit_artifact, prepare_artifact
from minitron_mp.distributed.sync import on_rank_0, raise_on_all_ranks
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch

FREE_SPACE_MARGIN = 1.1

DAMAGE = (
    dist_checkpointing.core.CheckpointingException,
    KeyError,
    ValueError,
    OSError,
    EOFError,
    RuntimeError,
    pickle.UnpicklingError,
)
"""What a missing, truncated or foreign file in a checkpoint makes torch and Megatron raise."""

# From 0.17 on Megatron would rather use nvidia-resiliency-ext, which only GPU containers have; its own writers are in all versions.
OWN_WRITERS = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)


def model_state(chunks: list[Any], world: Any) -> dict[str, Any]:
    """Sharded state of this rank's chunks: checkpoint keys that do not depend on the layout (arch.AXES).

    Megatron and Transformer Engine add an _extra_state object to each layer, for FP8 scales. It is left out; under delayed scaling alone it holds
    anything that the tensors at hand do not say.
    """
    metadata = {"dp_cp_group": world.groups.dp_cp}
    states = [chunk.sharded_state_dict(metadata=metadata) for chunk in chunks]
    return {
        f"model{i}": {k: v for k, v in state.items() if not k.endswith("_extra_state")}
        for i, state in enumerate(states)
    }


def scaling_state(chunks: list[Any], world: Any) -> dict[str, Any]:
    """The histories of largest values behind the scales of delayed FP8, for the checkpoints of a run; nothing of other models.

    By layer, under numbers that do not depend on the pipeline; equal on tensor and data parallel ranks, which reduce them.
    """
    metadata, delayed = (
        {"dp_cp_group": world.groups.dp_cp},
        [chunk.config.fp8 and chunk.config.fp8_recipe == "delayed" for chunk in chunks],
    )
    states = {
        f"scaling{i}": chunk.sharded_state_dict(metadata=metadata)
        for i, chunk in enumerate(chunks)
        if delayed[i]
    }
    return {
        name: {k: v for k, v in state.items() if "linear" in k and k.endswith("_extra_state")}
        for name, state in states.items()
    }


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The state under other checkpoint keys, in place: a second model in one checkpoint."""
    add_prefix_for_sharding(state, prefix)
    return state


def load_weights(chunks: list[Any], folder: Path, world: Any, prefix: str = "") -> None:
    """Fill the chunks from a checkpoint of any layout and dtype; reached by all ranks.

    prefix: beginning of this model's keys in the checkpoint.
    """
    state = prefixed(model_state(chunks, world), prefix)
    for i, chunk in enumerate(chunks):
        if chunk.config.fp8_param:
            _receive_whole(state[f"model{i}"])
    state = load_checkpoint(state, folder)
    for i, chunk in enumerate(chunks):
        missing = [
            k
            for k in chunk.load_state_dict(state[f"model{i}"], strict=False).missing_keys
            if not k.endswith("_extra_state")
        ]
        assert not missing, missing


def _receive_whole(state: dict[str, Any]) -> None:
    """Let a checkpoint be read into bf16 tensors on the CPU, not into weights in FP8, which load_state_dict() then quantises each as a whole.

    Megatron-Core 0.19 would write to the weights as it reads, piece by piece (gate and up of a gated fc1; the shards of another layout), and
    a tensor that is scaled as one would keep the scale of the last piece for all of them.
    """
    for entry in nested_values(state):
        entry.data = torch.empty(entry.data.shape, dtype=entry.data.dtype)


def vocabulary_shard(arch: Arch, tensor: torch.Tensor, world: Any) -> ShardedTensor:
    """A rank's rows [v/tp, h] of the output layer, under the key of its weight, for load(); on the last pipeline stage."""
    key = "embedding.word_embeddings.weight" if arch.tied else "output_layer.weight"
    groups = world.groups
    return ShardedTensor.from_rank_offsets(
        key, tensor, (0, groups.tp.rank(), groups.tp.size()), replica_id=groups.dp_cp.rank()
    )


def load_checkpoint(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """dist_checkpointing.load with errors that name the folder."""
    with _readable(folder):
        return dist_checkpointing.load(state, str(folder))


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except dist.DistError:
        raise
    except (CheckpointException, *DAMAGE) as error:
        raise InputError(
            f"{folder} is no checkpoint of this model or damaged: {_cause(error)}; delete it and run its stage again"
        ) from error


def _cause(error: BaseException) -> str:
    """In one line. CheckpointException is torch's, no Exception: what failed on some rank, with its traceback; Megatron tells only the first rank."""
    while isinstance(error, CheckpointException):
        if not error.failures:
            return "rank 0 says why"
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__} {error}".strip()


def checkpoint_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Checkpoint key -> dtype, of every tensor in a checkpoint; reads the metadata only, any process may."""
    with _readable(folder):
        metadata = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    return {
        key: entry.properties.dtype
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def save_checkpoint(
    state: dict[str, Any], folder: Path, manifest: Manifest, extra: Callable[[Path], None] | None = None
) -> None:
    """Write a sharded state as the artefact `folder`; reached by all ranks, replaces an old one only when whole.

    extra: called on rank 0 with the folder before it takes its place, for small files that belong to it. InputError on every
    rank when there is not enough room, before anything is written.
    """
    _make_room(state, folder)
    with _writing(folder):
        dist_checkpointing.save(state, str(aside_path(folder)))

    def finish() -> None:
        if extra is not None:
            extra(aside_path(folder))
        commit_artifact(folder, manifest)

    on_rank_0(finish)


class AsyncCheckpointWriter:
    """Writes checkpoints while their ranks go on: one at a time, in forked processes that have the state as it was.

    A kill leaves what is written without a name (artifact.aside); it becomes the artefact in finish(). All methods but `writing` are
    reached by all ranks.
    """

    def __init__(self) -> None:
        self.queue, self.folder = AsyncCallsQueue(), Path()

    def start(
        self, state: dict[str, Any], folder: Path, manifest: Manifest, after: Callable[[], None]
    ) -> None:
        """As save(), but returns when the state is copied. after: called on rank 0 when the artefact is whole."""
        self.finish()  # their results share a queue
        _make_room(state, folder)
        self.folder = folder
        with _writing(folder):
            request = dist_checkpointing.save(
                state, str(aside_path(folder)), async_sharded_save=True, **OWN_WRITERS
            )

            def finish() -> None:
                commit_artifact(folder, manifest)
                after()

            assert request is not None
            request.add_finalize_fn(lambda: on_rank_0(finish))
            self.queue.schedule_async_request(request)

    @property
    def pending(self) -> bool:
        """Whether something was started and not finished; equal on all ranks."""
        return self.queue.get_num_unfinalized_calls() > 0

    @property
    def writing(self) -> bool:
        """Whether this rank still writes."""
        return any(
            not call.async_caller.is_current_async_call_done(blocking=False, no_dist=True)
            for call in self.queue.async_calls
        )

    def finish(self) -> None:
        """Wait until what was started is whole; InputError on every rank when it could not be written."""
        with _writing(self.folder):
            self.queue.maybe_finalize_async_calls(blocking=True)


def _make_room(state: dict[str, Any], folder: Path) -> None:
    on_rank_0(
        lambda: shutil.rmtree(aside_path(folder), ignore_errors=True)
    )  # what a kill left would count against the room
    check_room(sum(_written_bytes(entry) for entry in nested_values(state)), folder)
    on_rank_0(lambda: prepare_artifact(folder))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (
        OSError,
        RuntimeError,
        CheckpointException,
    ) as error:  # a quota, a vanished mount: the old artefact is untouched
        on_rank_0(lambda: shutil.rmtree(aside_path(folder), ignore_errors=True))
        raise InputError(f"{folder} could not be written: {_cause(error)}") from error


def check_room(num_bytes: float, folder: Path) -> None:
    """InputError on every rank when the disk of folder lacks what all ranks are to write, num_bytes on this one.

    A full disk in the middle of a save stops the writer processes of some ranks only; so look before.
    """
    needed = torch.tensor(float(num_bytes))
    dist.all_reduce(needed)
    near = next(p for p in folder.absolute().parents if p.exists())
    free = shutil.disk_usage(near).free
    short = needed.item() * FREE_SPACE_MARGIN > free
    raise_on_all_ranks(
        InputError(
            f"{folder} needs up to {needed.item() / 1e9:.2f} GB, {near} has {free / 1e9:.2f} GB free; make room or set another output"
        )
        if short
        else None
    )


def _written_bytes(entry: Any) -> int:
    """Bytes that this rank writes of one entry; replicas are written once."""
    data = getattr(entry, "data", None)
    return data.nbytes if isinstance(data, torch.Tensor) and is_main_replica(entry.replica_id) else 0
