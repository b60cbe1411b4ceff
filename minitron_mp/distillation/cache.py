"""The teacher stream on disk: what the ranks of a teacher made once, read by a student of any layout.

A folder of safetensors files, one set for each rank of the teacher's last stage, each tensor [s', b, n'] under the microbatch's id
(stream.py). Writer and Reader stand for Sender and Receiver: the same messages say which blocks of whose tensor a rank wants, only
that they are read and not received. cache.json names the shape and the teacher's layout; the artefact's manifest what made it all.
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

INDEX = "cache.json"


class Writer:
    """In the place of a stream.Sender, on one rank of the teacher's last stage."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        self.shard: dict[str, Tensor] = {}

    def make_room(self, count: int = 1) -> None:
        """There is always room, or else send() says that there is none."""

    def send(self, id: int, signal: Tensor) -> None:
        self.shard[str(id)] = signal.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if sum(tensor.nbytes for tensor in self.shard.values()) >= SHARD_BYTES:
            self.finish()

    def end(self, first: int, last: int) -> None: ...

    def finish(self) -> None:
        if not self.shard:
            return
        path = (
            self.folder / f"rank{self.rank:05d}_{int(next(iter(self.shard))):012d}.safetensors"
        )  # named after its first id
        try:
            save_file(self.shard, path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be written: {error}") from error
        self.shard = {}


def write_index(folder: Path, shape: StreamShape, teacher: Grid, first: int, last: int) -> None:
    """One process: what a reader needs to know. Microbatches [first, last) are there."""
    content = {
        "shape": {**vars(shape), "dtype": str(shape.dtype).removeprefix("torch.")},
        "teacher": {"parallel": teacher.parallel.model_dump(), "dp": teacher.dp},
        "ids": [first, last],
    }
    write_text(folder / INDEX, json.dumps(content, indent=1))


class Reader:
    """In the place of a stream.Receiver, on one rank of the student's last stage at (dp, cp, tp): get(id) in any order."""

    def __init__(
        self,
        folder: Path,
        shape: StreamShape,
        student: Grid,
        place: tuple[int, int, int],
        ids: Sequence[int],
        device: torch.device,
    ):
        content = read_json(folder / INDEX, "cache --force")
        found = StreamShape(**{**content["shape"], "dtype": getattr(torch, content["shape"]["dtype"])})
        first, last = content["ids"]
        if found != shape or (ids and not (first <= min(ids) and max(ids) < last)):
            raise InputError(
                f"{folder} holds microbatches {first} to {last - 1} of {found}, wanted are {min(ids)} to {max(ids)} of {shape}; run `minitron-mp cache` again"
            )
        self.folder, self.shape, self.student, self.device = folder, shape, student, device
        self.teacher = Grid(
            "teacher", ParallelConfig(**content["teacher"]["parallel"]), content["teacher"]["dp"]
        )
        self.rank = student.last_stage(*place)
        self.starts: dict[int, list[tuple[int, Path]]] = {}

    def get(self, id: int) -> Tensor:
        """[s', b, n'] of this rank."""
        shape = self.shape
        signal = torch.empty(shape.local(self.student.parallel), dtype=shape.dtype)
        for block in messages(shape, self.teacher, self.student, id % self.teacher.dp, id % self.student.dp):
            if block.target == self.rank:
                signal[block.target_rows, :, block.target_columns] = self._tensor(block.source, id)[
                    block.source_rows, :, block.source_columns
                ]
        return signal.to(self.device, non_blocking=True)

    def traffic(self) -> Traffic | None:
        return None

    def release(self, id: int) -> None: ...
    def close(self) -> None: ...

    def _tensor(self, source: int, id: int) -> Any:
        """A slice of safetensors: only what is asked of it is read."""
        if source not in self.starts:
            self.starts[source] = sorted(
                (int(path.stem.split("_")[1]), path)
                for path in self.folder.glob(f"rank{source:05d}_*.safetensors")
            )
        files = self.starts[source]
        number = bisect_right(files, id, key=lambda file: file[0]) - 1
        if number < 0:
            raise InputError(
                f"{self.folder} lacks microbatch {id} of teacher rank {source}; delete it and run `minitron-mp cache` again"
            )
        path = files[number][1]
        try:
            with safe_open(path, "pt") as file:
                return file.get_slice(str(id))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} is damaged or lacks microbatch {id} ({error}); delete {self.folder} and run `minitron-mp cache` again"
            ) from error
