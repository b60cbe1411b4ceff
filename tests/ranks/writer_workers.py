"""What test_writer_processes.py runs on a rank of a pool."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import torch
from cases import Layout
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from model_workers import joined

from minitron_mp.artifacts.checkpoint import save_checkpoint
from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.artifacts.writer_processes import forked_writers
from minitron_mp.errors import InputError


def save_without_manager(*, folder: str) -> str:
    """Kill the manager of the checkpoint writers, save a checkpoint, and return the error."""
    before = filesystem_async._results_queue
    filesystem_async._results_queue = None
    older = multiprocessing.active_children()
    try:
        with joined(Layout("one", 1)):
            with forked_writers():
                pass
            for child in multiprocessing.active_children():
                if child not in older and child.name.startswith("SyncManager"):
                    child.kill()
                    child.join()
            state = {"a": ShardedTensor.from_rank_offsets("a", torch.ones(4))}
            save_checkpoint(state, Path(folder), Manifest(stage="model", settings={}, inputs={}))
            return "no error"
    except InputError as error:
        return str(error)
    finally:
        filesystem_async._results_queue = before
