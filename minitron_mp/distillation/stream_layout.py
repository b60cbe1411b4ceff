"""The sizes of a transformer, and the table that says which axis of which parameter is which model axis.

Everything that prunes, converts or counts reads AXES. Its keys are Megatron-Core's checkpoint keys, which do not depend on
the parallel layout: layers are stacked on dim 0, so a key with axis "layer" is one global tensor of all layers.

    h hidden  f ffn  v padded vocabulary  np heads  ng query groups  hn head width  L layers

The qkv rows are interleaved by query group. With 4 heads in 2 groups the "heads" along dim 1 of linear_qkv.weight are
    q0 q1 k0 v0  q2 q3 k1 v1        each hn rows
and fc1 holds all gate rows, then all up rows: (2f, h); without a gate the up rows alone: (f, h).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.models.arch import Arch


@dataclass(frozen=True)
class HeadSpec:
    """All that stands between the tapped hidden states and the logits. Who streams hidden states and who makes logits of them must agree.

    The models of this library have their last norm before the tap, and neither scale, soft cap nor bias after it.
    """

    hidden_size: int
    vocab_size: int
    padded_vocab_size: int
    tap: str = "after the final norm"
    logit_scale: float = 1.0
    soft_cap: float | None = None
    bias: bool = False

    @classmethod
    def of(cls, arch: Arch) -> HeadSpec:
        return cls(arch.hidden_size, arch.vocab_size, arch.padded_vocab_size)


Payload = Literal["hidden", "logits", "topk"]


class Traffic(NamedTuple):
    """What this rank has received from a remote teacher so far."""

    wait_s: float
    """Seconds for which the host waited for signals."""
    num_bytes: int


@dataclass(frozen=True)
class Grid:
    """A role's layout over its span of job ranks, which start at `first`."""

    role: str
    parallel: ParallelConfig
    dp: int
    first: int = 0

    @property
    def size(self) -> int:
        return self.parallel.model_ranks * self.dp

    def rank(self, stage: int, dp: int, cp: int, tp: int) -> int:
        """Job rank of a place; Megatron's order: tp fastest, then cp, dp, pp. stage: -1 for the last one."""
        p = self.parallel
        return self.first + ((stage % p.pp * self.dp + dp) * p.cp + cp) * p.tp + tp

    def last_stage(self, dp: int, cp: int, tp: int) -> int:
        """Job rank of a place on the last pipeline stage."""
        return self.rank(-1, dp, cp, tp)

    def describe(self, rank: int) -> str:
        p, place = self.parallel, rank - self.first
        tp, place = place % p.tp, place // p.tp
        cp, place = place % p.cp, place // p.cp
        return f"{self.role} rank {rank - self.first} (job rank {rank}; dp {place % self.dp}, pp {place // self.dp}, cp {cp}, tp {tp})"


@dataclass(frozen=True)
class StreamShape:
    """What all microbatches have in common. width: n of the whole payload."""

    payload: Payload
    sequence_length: int
    micro_batch_size: int
    width: int
    dtype: torch.dtype

    def local(self, parallel: ParallelConfig) -> tuple[int, int, int]:
        """[s', b, n'] of one rank of the last stage."""
        rows = sum(high - low for low, high, _ in rows_of(self, parallel, 0, 0))
        return (
            rows,
            self.micro_batch_size,
            self.width // parallel.tp if self.payload == "logits" else self.width,
        )

    def bytes_per_token(self) -> int:
        return self.width * self.dtype.itemsize


@dataclass(frozen=True)
class Message:
    """One block: rows and columns of the sender's local tensor, of the receiver's, and the two job ranks."""

    source: int
    target: int
    source_rows: slice
    source_columns: slice
    target_rows: slice
    target_columns: slice

    def shape(self, micro_batch_size: int) -> tuple[int, int, int]:
        rows, columns = self.target_rows, self.target_columns
        return rows.stop - rows.start, micro_batch_size, columns.stop - columns.start


def splits_sequence(shape: StreamShape, parallel: ParallelConfig) -> bool:
    """Whether each tensor parallel rank sends or receives its own part of the tokens: for logits, and what does not divide, all have all."""
    return shape.payload != "logits" and shape.sequence_length // parallel.cp % parallel.tp == 0


def rows_of(shape: StreamShape, parallel: ParallelConfig, cp: int, tp: int) -> list[tuple[int, int, int]]:
    """(first global token, end, place in the local tensor) of the intervals that a rank of the last stage holds, in local order."""
    n = parallel.cp
    half = shape.sequence_length // (2 * n)
    intervals = (
        [(0, shape.sequence_length)] if n == 1 else [(i * half, (i + 1) * half) for i in (cp, 2 * n - 1 - cp)]
    )
    local = shape.sequence_length // n
    low, high = (
        (tp * local // parallel.tp, (tp + 1) * local // parallel.tp)
        if splits_sequence(shape, parallel)
        else (0, local)
    )
    found, place = [], 0
    for first, end in intervals:  # place: of the interval among the tokens of this context parallel rank
        a, b = max(low, place), min(high, place + end - first)
        if a < b:
            found.append((first + a - place, first + b - place, a - low))
        place += end - first
    return found


def columns_of(shape: StreamShape, parallel: ParallelConfig, tp: int) -> tuple[int, int]:
    """Interval of the payload's columns that a rank holds."""
    part = shape.width // parallel.tp
    return (tp * part, (tp + 1) * part) if shape.payload == "logits" else (0, shape.width)


@lru_cache(maxsize=4096)
def messages(
    shape: StreamShape, teacher: Grid, student: Grid, teacher_dp: int, student_dp: int, stage: int = -1
) -> tuple[Message, ...]:
    """All blocks that go from one teacher replica to a stage of one student replica for a microbatch, in the order in which both ends walk them."""
    found = []
    for (cp_s, tp_s), (cp_t, tp_t) in itertools.product(_places(student.parallel), _places(teacher.parallel)):
        if tp_t and shape.payload != "logits" and not splits_sequence(shape, teacher.parallel):
            continue  # all tensor parallel ranks have the same: the first one sends
        (low_s, high_s), (low_t, high_t) = (
            columns_of(shape, student.parallel, tp_s),
            columns_of(shape, teacher.parallel, tp_t),
        )
        low, high = max(low_s, low_t), min(high_s, high_t)
        if low >= high:
            continue
        columns = slice(low - low_t, high - low_t), slice(low - low_s, high - low_s)
        for (first_s, end_s, at_s), (first_t, end_t, at_t) in itertools.product(
            rows_of(shape, student.parallel, cp_s, tp_s), rows_of(shape, teacher.parallel, cp_t, tp_t)
        ):
            a, b = max(first_s, first_t), min(end_s, end_t)
            if a < b:
                rows = (
                    slice(at_t + a - first_t, at_t + b - first_t),
                    slice(at_s + a - first_s, at_s + b - first_s),
                )
                ends = teacher.last_stage(teacher_dp, cp_t, tp_t), student.rank(stage, student_dp, cp_s, tp_s)
                found.append(Message(*ends, rows[0], columns[0], rows[1], columns[1]))
    return tuple(found)


def _places(parallel: ParallelConfig) -> Iterator[tuple[int, int]]:
    return itertools.product(range(parallel.cp), range(parallel.tp))
