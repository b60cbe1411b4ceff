"""Teachers of a Megatron-Bridge recipe: on the student's ranks, or on separate ranks.

s' is s/cp, or s/cp/tp under sequence parallelism  b microbatch  h_t hidden size of the teacher
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mp.artifacts.saved_model import load_model, saved_arch
from minitron_mp.distillation.teacher import Teacher, TeacherSignal
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.process_groups import host_group
from minitron_mp.distributed.world import World
from minitron_mp.losses.objective import TeacherHidden, TeacherTarget
from minitron_mp.models.arch import Arch
from minitron_mp.models.sharded_model import DTYPES, output_weight


class BridgeTeacher(Protocol):
    """The protocol of a teacher for KDForwardStep.

    Bridge drives the schedule, so the teacher computes one microbatch at a time.
    """

    arch: Arch

    def start(self, world: World, sequence_length: int) -> None:
        """Prepare for training. Called by all ranks."""

    def signal(self, batch: Batch, student: Any) -> TeacherSignal | None:
        """Return the teacher's part of a microbatch.

        Called on every stage, before the student's forward pass. None in evaluation, when the
        teacher has no signal for it, and on stages without a loss.
        """

    def target(self, signal: TeacherSignal) -> TeacherTarget:
        """Return the target of the loss, on the last stage."""

    def release(self, signal: TeacherSignal) -> None:
        """Free a signal that the loss has used, on the last stage."""

    def end_step(self) -> None:
        """Wait for pending transfers at the end of a step. Called by all ranks."""

    def close(self) -> None:
        """Free the teacher. Called by all ranks."""


class ColocatedTeacher:
    """A frozen teacher on the student's ranks, in the student's layout.

    Each stage runs its part of the teacher just before the student's part of a microbatch. The
    teacher's hidden states are sent between stages in a separate process group, because NCCL would
    match them with the student's transfers by order in the student's group. A sent tensor is kept
    until it is received, for at most pp microbatches.

    folder: checkpoint of `minitron-mp import`.
    """

    def __init__(self, folder: str | Path, *, precision: str = "bf16"):
        self.folder, self.precision = Path(folder), precision
        self.arch = saved_arch(self.folder)
        self.chunk: Any = None
        self.group: dist.ProcessGroup | None = None
        self.pending: deque[tuple[dist.Work, Tensor]] = deque()
        self.num_signals = 0

    def start(self, world: World, sequence_length: int) -> None:
        self.world = world
        model = load_model(self.folder, world, sequence_length=sequence_length, precision=self.precision)
        (self.chunk,) = model.freeze().chunks
        pipeline_of_rank: list[list[int]] = [[]] * dist.get_world_size()
        pipeline = dist.get_process_group_ranks(world.groups.pp)
        dist.all_gather_object(pipeline_of_rank, pipeline, group=host_group())
        pipelines = sorted({tuple(ranks) for ranks in pipeline_of_rank}) if world.parallel.pp > 1 else []
        for ranks in pipelines:  # every rank has to create all groups
            group = dist.new_group(list(ranks))
            if dist.get_rank() in ranks:
                self.group = group

    def signal(self, batch: Batch, student: Any) -> TeacherSignal | None:
        stage, last = self.world.groups.pp.rank(), self.world.parallel.pp - 1
        if stage:
            input_tensor = student.decoder.input_tensor  # [s', b, h_s], set by Megatron's schedule
            received = torch.empty(
                (*input_tensor.shape[:2], self.arch.hidden_size),
                dtype=DTYPES[self.precision],
                device=input_tensor.device,
            )
            dist.recv(received, group=self.group, group_src=stage - 1)
            self.chunk.set_input_tensor([received])
        with torch.no_grad():
            output = self.chunk(batch.get("tokens"), batch.get("position_ids"), None)
        if stage == last:
            self.num_signals += 1
            return TeacherSignal(self.num_signals - 1, output.transpose(0, 1))
        while len(self.pending) >= self.world.parallel.pp:
            self.pending.popleft()[0].wait()
        self.pending.append((dist.isend(output, group=self.group, group_dst=stage + 1), output))
        return None

    def target(self, signal: TeacherSignal) -> TeacherTarget:
        assert signal.hidden is not None
        return TeacherHidden(signal.hidden, output_weight(self.chunk))

    def release(self, signal: TeacherSignal) -> None: ...

    def end_step(self) -> None:
        while self.pending:
            self.pending.popleft()[0].wait()

    def close(self) -> None:
        self.chunk = None  # frees its memory


class RemoteTeacher:
    """A teacher on separate ranks, in a separate layout.

    source: distillation.teacher.RemoteTeacher, which has the payload. arch: of the teacher.
    first_microbatch: of this data-parallel rank, if the run is resumed.

    The job has the roles of distributed.roles.join_roles(), so Bridge's default process group is
    the student's (docs/megatron_bridge.md). Then evaluation inside pretrain() has no teacher,
    because the teacher serves only training microbatches.
    """

    def __init__(self, source: Teacher, arch: Arch, first_microbatch: int = 0):
        self.source, self.arch = source, arch
        self.num_signals = first_microbatch

    def start(self, world: World, sequence_length: int) -> None:
        self.world = world

    def signal(self, batch: Batch, student: Any) -> TeacherSignal | None:
        if not torch.is_grad_enabled():
            return None
        dp = self.world.groups.dp
        self.num_signals += 1
        return TeacherSignal((self.num_signals - 1) * dp.size() + dp.rank())

    def target(self, signal: TeacherSignal) -> TeacherTarget:
        return self.source.target(signal)

    def release(self, signal: TeacherSignal) -> None:
        self.source.release(signal)

    def end_step(self) -> None: ...

    def close(self) -> None:
        self.source.close()
