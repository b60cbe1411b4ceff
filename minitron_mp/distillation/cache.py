"""Teacher signals on disk. A teacher writes them once, and students of any layout read them.

The folder has safetensors files, one set for each rank of the teacher's last stage. Each tensor is
the rank's part [s', b, n'] of a microbatch. Its name is the number of the microbatch. cache.json
has the shape of the signals and the teacher's layout. The manifest of the artifact has the settings
and inputs of the signals.

Writer replaces stream.Sender, and Reader replaces receiver.Receiver. The messages of
stream_layout.py determine the blocks that a rank needs.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron_mp.artifacts.files import read_json, write_text
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distillation.stream_layout import Grid, StreamShape, Traffic, messages
from minitron_mp.errors import InputError

SHARD_BYTES = 1e9
"""Size of the tensors in memory at which a file is written."""

INDEX = "cache.json"


class Writer:
    """Writes the signals of one rank of the teacher's last stage.

    rank: number of the rank in the teacher's grid.
    """

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        self.shard: dict[str, Tensor] = {}

    def make_room(self, count: int = 1) -> None: ...

    def send(self, id: int, signal: Tensor, computed: torch.cuda.Event | None = None) -> None:
        """Add this rank's part [s', b, n'] of a microbatch. computed: not used, the copy waits."""
        self.shard[str(id)] = signal.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if sum(tensor.nbytes for tensor in self.shard.values()) >= SHARD_BYTES:
            self.finish()

    def end(self, first: int, last: int) -> None: ...

    def finish(self) -> None:
        """Write the tensors that were added since the last file."""
        if not self.shard:
            return
        first_id = int(next(iter(self.shard)))
        path = self.folder / f"rank{self.rank:05d}_{first_id:012d}.safetensors"
        try:
            save_file(self.shard, path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} cannot be written: {error}; check the disk, or set another output"
            ) from error
        self.shard = {}


def write_index(folder: Path, shape: StreamShape, teacher: Grid, first: int, last: int) -> None:
    """Write cache.json for a folder with microbatches [first, last). One rank calls it."""
    content = {
        "shape": {**vars(shape), "dtype": str(shape.dtype).removeprefix("torch.")},
        "teacher": {"parallel": teacher.parallel.model_dump(), "dp": teacher.dp},
        "ids": [first, last],
    }
    write_text(folder / INDEX, json.dumps(content, indent=1))


class Reader:
    """Reads the signals for one rank of the student's last stage, in any order.

    coordinates: (dp, cp, tp) of the rank. ids: all microbatches that will be read.
    """

    def __init__(
        self,
        folder: Path,
        shape: StreamShape,
        student: Grid,
        coordinates: tuple[int, int, int],
        ids: Sequence[int],
        device: torch.device,
    ):
        content = read_json(folder / INDEX, "cache --force")
        dtype = getattr(torch, content["shape"]["dtype"])
        cached_shape = StreamShape(**{**content["shape"], "dtype": dtype})
        first, last = content["ids"]
        if cached_shape != shape or (ids and not (first <= min(ids) and max(ids) < last)):
            raise InputError(
                f"{folder} has microbatches {first} to {last - 1} of {cached_shape}, but the student needs "
                f"{min(ids)} to {max(ids)} of {shape}; run `minitron-mp cache` again"
            )
        self.folder, self.shape, self.student, self.device = folder, shape, student, device
        parallel = ParallelConfig(**content["teacher"]["parallel"])
        self.teacher = Grid("teacher", parallel, content["teacher"]["dp"])
        self.rank = student.last_stage(*coordinates)
        self.files: dict[int, list[tuple[int, Path]]] = {}
        """Teacher rank -> (first microbatch, file), ascending."""

    def get(self, id: int) -> Tensor:
        """Read this rank's part [s', b, n'] of a microbatch."""
        shape = self.shape
        signal = torch.empty(shape.local(self.student.parallel), dtype=shape.dtype)
        for block in messages(shape, self.teacher, self.student, id % self.teacher.dp, id % self.student.dp):
            if block.target == self.rank:
                source = self._tensor(block.source, id)
                part = source[block.source_rows, :, block.source_columns]
                signal[block.target_rows, :, block.target_columns] = part
        return signal.to(self.device, non_blocking=True)

    def release(self, id: int) -> None: ...

    def traffic(self) -> Traffic | None:
        return None

    def close(self) -> None: ...

    def _tensor(self, source: int, id: int) -> Any:
        """Return a teacher rank's tensor of a microbatch. Only indexed parts are read from disk."""
        if source not in self.files:
            paths = self.folder.glob(f"rank{source:05d}_*.safetensors")
            self.files[source] = sorted((int(path.stem.split("_")[1]), path) for path in paths)
        files = self.files[source]
        number = bisect_right(files, id, key=lambda file: file[0]) - 1
        if number < 0:
            raise InputError(
                f"{self.folder} has no microbatch {id} of teacher rank {source}; "
                "delete the folder and run `minitron-mp cache` again"
            )
        path = files[number][1]
        try:
            with safe_open(path, "pt") as file:
                return file.get_slice(str(id))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} is damaged or has no microbatch {id} ({error}); "
                f"delete {self.folder} and run `minitron-mp cache` again"
            ) from error
