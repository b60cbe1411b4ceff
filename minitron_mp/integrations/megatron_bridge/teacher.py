"""Inside a Megatron-Bridge recipe: our pruned student, teacher and loss in Bridge's pretrain(), scores of a model that Bridge built, and export.

The only file that imports megatron.bridge, and only when a function that needs it is called. Bridge has two ways to say what a model
is, and both end in chunks of megatron-core's GPTModel; a hook on these chunks, before they are wrapped, is all that we add:

    provider   0.6: AutoBridge.to_megatron_provider(), hooks by register_pre_wrap_hook()
    config     main: AutoBridge.get_model_config(), hooks in the list pre_wrap_hooks; Bridge 0.6 trains such a config, too

    cfg.model = bridge.student("out/student", sequence_length=4096)
    step = bridge.KDForwardStep(bridge.BesideStudent("out/teacher"), vocab_size=...)
    bridge.check(cfg, step)
    pretrain(cfg, step, callbacks=[step])

s sequence  b microbatch  h hidden  v padded vocabulary; s' is s/cp, under sequence parallelism s/cp/tp
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mp.distillation.frozen_model import ModelCheckpoint, frozen_model
from minitron_mp.distillation.teacher import Teacher, TeacherSignal
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.world import World
from minitron_mp.integrations.megatron_bridge.model import _arch_in
from minitron_mp.losses.fused import TeacherHidden
from minitron_mp.losses.fused import TeacherTarget as Target
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import DTYPES, output_weight


# ---- the teacher -------------------------------------------------------------------------------------------------------------------
class ColocatedTeacher:
    """A frozen teacher on the student's ranks, in the student's layout: each stage runs its part just before the student's part of a microbatch.

    Its hidden states travel from stage to stage in a process group of their own (in the student's, NCCL would match them with the student's by
    order alone). What a stage has sent is held until it is received, of pp microbatches at most.
    """

    def __init__(self, folder: str | Path, *, precision: str = "bf16"):
        self.folder, self.precision, self.arch = Path(folder), precision, _arch_in(Path(folder))
        self.sent: deque[tuple[Any, Tensor]] = deque()
        self.chunk: Any = None
        self.group: Any = None

    def start(self, world: World, sequence_length: int) -> None:
        """Load it; reached by all ranks."""
        self.world = world
        self.chunk = frozen_model(
            ModelCheckpoint(self.arch, self.folder),
            world,
            precision=self.precision,
            sequence_length=sequence_length,
        ).last_chunk
        mine: list[list[int]] = [[]] * dist.get_world_size()
        dist.all_gather_object(mine, dist.get_process_group_ranks(world.groups.pp))
        for ranks in sorted(map(list, set(map(tuple, mine)))) if world.parallel.pp > 1 else []:
            group = dist.new_group(ranks)
            self.group = group if dist.get_rank() in ranks else self.group

    def signal(self, batch: Batch, student: Any) -> Tensor | None:
        """Hidden states [s', b, h_t] after the final norm on the last stage, None elsewhere; called by every stage before the student's forward pass."""
        stage, last = self.world.groups.pp.rank(), self.world.parallel.pp - 1
        if stage:
            rows = (
                student.decoder.input_tensor
            )  # [s', b, h_s]: the student's, which Megatron's schedule has set
            received = torch.empty(
                (*rows.shape[:2], self.arch.hidden_size), dtype=DTYPES[self.precision], device=rows.device
            )
            dist.recv(received, group=self.group, group_src=stage - 1)
            self.chunk.set_input_tensor([received])
        with torch.no_grad():
            output = self.chunk(batch.get("tokens"), batch.get("position_ids"), None)
        if stage == last:
            return output.transpose(0, 1)
        while len(self.sent) >= self.world.parallel.pp:
            self.sent.popleft()[0].wait()
        self.sent.append((dist.isend(output, group=self.group, group_dst=stage + 1), output))
        return None

    def target(self, signal: Tensor) -> Target:
        return TeacherHidden(signal, output_weight(self.chunk))

    def done(self, signal: Any) -> None:
        """The loss is done with it."""

    def end_step(self) -> None:
        while self.sent:
            self.sent.popleft()[0].wait()

    def close(self) -> None:
        """Give its memory back."""
        self.chunk = None


class RemoteTeacher:
    """A teacher on ranks of its own, with a layout of its own, as stream.py brings it. source: teacher.RemoteTeacher, which knows the payload.

    The job is one of parallel.roles(), so Bridge's default process group is the student's; docs/bridge.md has what that takes. Evaluation inside
    pretrain() has no teacher then: its microbatches are not among those that the teacher serves.
    """

    def __init__(self, source: Teacher, arch: Arch, first_microbatch: int = 0):
        self.source, self.arch, self.count = source, arch, first_microbatch

    def start(self, world: World, sequence_length: int) -> None:
        self.world = world

    def signal(self, batch: Batch, student: Any) -> TeacherSignal | None:
        """Id of the microbatch, counted from the first of this data parallel rank; None in evaluation."""
        if not torch.is_grad_enabled():
            return None
        dp, self.count = self.world.groups.dp, self.count + 1
        return TeacherSignal((self.count - 1) * dp.size() + dp.rank())

    def target(self, signal: TeacherSignal) -> Target:
        return self.source.target(signal)

    def done(self, signal: TeacherSignal) -> None:
        self.source.release(signal)

    def end_step(self) -> None: ...

    def close(self) -> None:
        self.source.close()
