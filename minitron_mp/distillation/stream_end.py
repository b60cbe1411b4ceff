"""Early end of a teacher stream: a preempted student stops in the same step as its teacher.

The teacher runs ahead of its students, so it chooses the last step. It may already have sent
signals beyond a step that a student would choose, and those sends would never be received.

    student   rank 0 of a student that was asked to stop writes a request to the job's store
    teacher   rank 0 reads the store before each block of microbatches. The stream then ends at the
              first step boundary after the block's first microbatch. It writes this step to the
              store, and broadcasts it to the teacher's ranks, which serve up to there
    student   all ranks read the store after each step, and stop after the step that is written
              there

When the teacher chooses the last step, no student has finished it, because one of its microbatches
has not been computed. So no rank can miss it, and all students of one stream stop after the same
step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from minitron_mp.distributed.preemption import Preemption
from minitron_mp.distributed.role_channel import RoleChannel

REQUESTED_KEY, LAST_STEP_KEY = "stream end requested", "stream end step"
"""Keys in the job's store."""


@dataclass
class StreamEnd:
    """Where a stream of teacher signals ends before its last microbatch.

    microbatches_per_step: over all data-parallel ranks of the student.
    lead_steps: steps by which the teacher may be ahead of the student.
    """

    channel: RoleChannel
    microbatches_per_step: int
    lead_steps: int = 0
    _last_step: int | None = field(default=None, init=False)

    def request(self, reason: str) -> None:
        """Ask the teacher to end the stream early."""
        self.channel.store.set(REQUESTED_KEY, reason)

    def last_step(self) -> int | None:
        """Return the number of steps after which the stream ends, or None while no end is chosen.

        All ranks of the students get the same answer after the same step.
        """
        store = self.channel.store
        if self._last_step is None and store.check([LAST_STEP_KEY]):
            self._last_step = int(store.get(LAST_STEP_KEY))
        return self._last_step

    def reason(self) -> str:
        """Return the reason that came with the request."""
        return self.channel.store.get(REQUESTED_KEY).decode()

    def limit(self, first: int, preemption: Preemption | None) -> int | None:
        """Return the number of the first microbatch that is not sent any more, or None.

        Called by all ranks of the teacher, before the block that starts with microbatch `first`.
        The broadcast is a small one on gloo, beside the GPU's work.
        """
        store, box = self.channel.store, torch.tensor([-1])
        if preemption is not None and preemption.sigterm and not store.check([REQUESTED_KEY]):
            self.request("SIGTERM on a rank of the teacher")
        if dist.get_rank() == 0 and store.check([REQUESTED_KEY]):
            box[0] = first // self.microbatches_per_step + 1
            store.set(LAST_STEP_KEY, str(box.item()))
        if dist.get_world_size() > 1:
            dist.broadcast(box, src=0)
        return None if box.item() < 0 else int(box.item()) * self.microbatches_per_step
