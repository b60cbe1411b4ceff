"""Messages between the ranks of teacher and student, as pure functions of their layouts.

    s  sequence length    b  microbatch
    n  payload width: h for "hidden", padded vocabulary for "logits", 2 k + 1 for "topk"
    s', n'  rows and columns of one rank

A signal is one tensor [s, b, n] per microbatch. It is sharded over the last pipeline stage of the
teacher. The last stage of the student needs it with a different sharding. Microbatch i belongs to
replica i % dp on both sides. messages() depends on layouts and replicas only, so both ends compute
the same list of transfers without communication.
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

Payload = Literal["hidden", "logits", "topk"]


@dataclass(frozen=True)
class HeadSpec:
    """The computation between the streamed hidden states and the logits (scale, soft cap, bias).

    Sender and receiver must use the same values. The models of this library stream the output of
    the final norm, and have no scale, soft cap or bias.
    """

    hidden_size: int
    vocab_size: int
    padded_vocab_size: int
    tap: str = "after the final norm"
    """Position in the model at which the hidden states are read."""
    logit_scale: float = 1.0
    soft_cap: float | None = None
    bias: bool = False

    @classmethod
    def of(cls, arch: Arch) -> HeadSpec:
        return cls(arch.hidden_size, arch.vocab_size, arch.padded_vocab_size)


class Traffic(NamedTuple):
    """Waiting time and received bytes of this rank, from a remote teacher, so far."""

    wait_s: float
    """Seconds for which the host waited for signals."""
    num_bytes: int


@dataclass(frozen=True)
class Grid:
    """Layout of a role over its span of job ranks, which starts at `first`."""

    role: str
    parallel: ParallelConfig
    dp: int
    first: int = 0

    @property
    def size(self) -> int:
        return self.parallel.model_ranks * self.dp

    def rank(self, stage: int, dp: int, cp: int, tp: int) -> int:
        """Return the job rank at these coordinates. Megatron's order is tp fastest, cp, dp, pp.

        stage: pipeline stage; -1 is the last one.
        """
        p = self.parallel
        return self.first + ((stage % p.pp * self.dp + dp) * p.cp + cp) * p.tp + tp

    def last_stage(self, dp: int, cp: int, tp: int) -> int:
        """Return the job rank at these coordinates on the last pipeline stage."""
        return self.rank(-1, dp, cp, tp)

    def describe(self, rank: int) -> str:
        """Return role and coordinates of a job rank."""
        p = self.parallel
        rest, tp = divmod(rank - self.first, p.tp)
        rest, cp = divmod(rest, p.cp)
        pp, dp = divmod(rest, self.dp)
        return f"{self.role} rank {rank - self.first} (job rank {rank}; dp {dp}, pp {pp}, cp {cp}, tp {tp})"


@dataclass(frozen=True)
class StreamShape:
    """Shape and dtype of the signals of all microbatches. width: n."""

    payload: Payload
    sequence_length: int
    micro_batch_size: int
    width: int
    dtype: torch.dtype

    def local(self, parallel: ParallelConfig) -> tuple[int, int, int]:
        """Return the shape [s', b, n'] on a rank of the last stage."""
        num_rows = sum(interval.end - interval.first for interval in rows_of(self, parallel, 0, 0))
        width = self.width // parallel.tp if self.payload == "logits" else self.width
        return num_rows, self.micro_batch_size, width


class Rows(NamedTuple):
    """An interval [first, end) of the sequence. local: its first row in the tensor of a rank."""

    first: int
    end: int
    local: int


@dataclass(frozen=True)
class Message:
    """One block of a signal: rows and columns in the tensors of the job ranks source and target."""

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
    """Return whether each tensor-parallel rank sends or receives a separate part of the tokens.

    Otherwise each rank has all tokens: for logits, and if tp does not divide the tokens.
    """
    return shape.payload != "logits" and shape.sequence_length // parallel.cp % parallel.tp == 0


def rows_of(shape: StreamShape, parallel: ParallelConfig, cp: int, tp: int) -> list[Rows]:
    """Return the intervals of tokens that a rank of the last stage holds, in local order."""
    length, n = shape.sequence_length, parallel.cp
    if n == 1:
        intervals = [(0, length)]
    else:  # in Megatron's order rank cp has the chunks cp and 2 n - 1 - cp of 2 n
        half = length // (2 * n)
        intervals = [(i * half, (i + 1) * half) for i in (cp, 2 * n - 1 - cp)]
    local_length = length // n
    low, high = 0, local_length
    if splits_sequence(shape, parallel):
        low, high = tp * local_length // parallel.tp, (tp + 1) * local_length // parallel.tp
    rows = []
    offset = 0  # start of the interval among the tokens of this context-parallel rank
    for first, end in intervals:
        a, b = max(low, offset), min(high, offset + end - first)
        if a < b:
            rows.append(Rows(first + a - offset, first + b - offset, a - low))
        offset += end - first
    return rows


def columns_of(shape: StreamShape, parallel: ParallelConfig, tp: int) -> tuple[int, int]:
    """Return the interval of the payload's columns that a rank holds."""
    if shape.payload != "logits":
        return 0, shape.width
    part = shape.width // parallel.tp
    return tp * part, (tp + 1) * part


@lru_cache(maxsize=4096)
def messages(
    shape: StreamShape, teacher: Grid, student: Grid, teacher_dp: int, student_dp: int, stage: int = -1
) -> tuple[Message, ...]:
    """Return the messages of a microbatch from a teacher replica to a stage of a student replica.

    Both ends process them in this order.
    """
    blocks = []
    for (cp_s, tp_s), (cp_t, tp_t) in itertools.product(
        _coordinates(student.parallel), _coordinates(teacher.parallel)
    ):
        if tp_t and shape.payload != "logits" and not splits_sequence(shape, teacher.parallel):
            continue  # all tensor-parallel ranks have the same tokens, so only the first one sends
        columns = _overlap(
            columns_of(shape, teacher.parallel, tp_t), columns_of(shape, student.parallel, tp_s)
        )
        if columns is None:
            continue
        source = teacher.last_stage(teacher_dp, cp_t, tp_t)
        target = student.rank(stage, student_dp, cp_s, tp_s)
        for rows_s, rows_t in itertools.product(
            rows_of(shape, student.parallel, cp_s, tp_s), rows_of(shape, teacher.parallel, cp_t, tp_t)
        ):
            rows = _overlap((rows_t.first, rows_t.end), (rows_s.first, rows_s.end))
            if rows is not None:
                source_rows = _shift(rows[0], rows_t.local)
                target_rows = _shift(rows[1], rows_s.local)
                blocks.append(Message(source, target, source_rows, columns[0], target_rows, columns[1]))
    return tuple(blocks)


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[slice, slice] | None:
    """Return the overlap of two intervals, relative to the start of each, or None without one."""
    low, high = max(a[0], b[0]), min(a[1], b[1])
    if low >= high:
        return None
    return slice(low - a[0], high - a[0]), slice(low - b[0], high - b[0])


def _shift(part: slice, offset: int) -> slice:
    return slice(part.start + offset, part.stop + offset)


def _coordinates(parallel: ParallelConfig) -> Iterator[tuple[int, int]]:
    """Yield (cp, tp) of the ranks of one stage of a replica."""
    return itertools.product(range(parallel.cp), range(parallel.tp))
