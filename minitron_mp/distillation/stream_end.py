"""Early end of a teacher stream: a preempted student and its teacher stop after the same step.

The teacher chooses the last step, because it runs ahead of its students. If a student chose the
step, the teacher might already have sent later signals, which no rank would receive.

    student   Rank 0 of a student with a stop request writes it to the job's store.
    teacher   Rank 0 reads the store before each block of microbatches. After a request, the stream
              ends at the first step boundary after the first microbatch of the block. Rank 0 writes
              this step to the store and broadcasts it to the teacher's ranks.
    student   All ranks read the store after each step, and stop after the step in the store.

When the teacher chooses the last step, no student has finished it, because one of its microbatches
is not computed yet. So every rank reads the step in time, and all students of a stream stop after
the same step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from minitron_mp.distributed.preemption import Preemption
from minitron_mp.distributed.process_groups import host_group
from minitron_mp.distributed.role_channel import RoleChannel

REQUESTED_KEY, LAST_STEP_KEY = "stream end requested", "stream end step"
"""Keys in the job's store."""


@dataclass
class StreamEnd:
    """The step at which a stream of teacher signals ends early.

    microbatches_per_step: number over all data-parallel ranks of the student.
    lead_steps: largest number of steps by which the teacher may be ahead of the student.
    """

    channel: RoleChannel
    microbatches_per_step: int
    lead_steps: int = 0
    _last_step: int | None = field(default=None, init=False)

    def request(self, reason: str) -> None:
        """Request an early end of the stream from the teacher."""
        self.channel.store.set(REQUESTED_KEY, reason)

    def last_step(self) -> int | None:
        """Return the number of steps after which the stream ends, or None without a chosen end.

        After the same step all ranks of the students get the same result.
        """
        store = self.channel.store
        if self._last_step is None and store.check([LAST_STEP_KEY]):
            self._last_step = int(store.get(LAST_STEP_KEY))
        return self._last_step

    def reason(self) -> str:
        """Return the reason of the request."""
        return self.channel.store.get(REQUESTED_KEY).decode()

    def limit(self, first: int, preemption: Preemption | None) -> int | None:
        """Return the number of the first microbatch that is not sent, or None without an early end.

        Reached by all ranks of the teacher, before the block that starts with microbatch `first`.
        It broadcasts one number on gloo, which does not wait for the GPU.
        """
        store, chosen_step = self.channel.store, torch.tensor([-1])
        if preemption is not None and preemption.was_signalled and not store.check([REQUESTED_KEY]):
            self.request("SIGTERM on a rank of the teacher")
        if dist.get_rank() == 0 and store.check([REQUESTED_KEY]):
            chosen_step[0] = first // self.microbatches_per_step + 1
            store.set(LAST_STEP_KEY, str(chosen_step.item()))
        if dist.get_world_size() > 1:
            dist.broadcast(chosen_step, src=0, group=host_group())
        return None if chosen_step.item() < 0 else int(chosen_step.item()) * self.microbatches_per_step
