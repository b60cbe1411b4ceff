"""Leaving before the end, with a checkpoint: near a deadline, for a stop file, after SIGTERM.

Each rank only notes what it sees. The trainer adds the wishes up in the collective that it makes anyway at each log interval, so all
ranks of a role know at the same step, and nothing is communicated for it alone.

A remote teacher runs ahead of its students, so it is the one to say where the stream ends (Ending):

    students  rank 0 of one that wants to leave asks for it in the job's store
    teacher   rank 0, before it starts a block of microbatches: the end is the first step boundary after the block's first microbatch.
              It says so in the store, then to its own ranks, and all of them serve up to there
    students  look into the store after each step, and leave after the step that was named

No student has done that step when the end is named: a microbatch of it is not computed yet. So no rank can miss it, and students of one
stream leave together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from minitron_mp.distributed.preemption import Preemption
from minitron_mp.distributed.role_channel import RoleChannel

REQUESTED_KEY, LAST_STEP_KEY = "leaving asked", "leaving ends"
"""Keys in the job's store."""


@dataclass
class StreamEnd:
    """Where a stream of signals ends early, as the module says. per_step: microbatches of a step, over all ranks; lead_steps: that the teacher may be ahead."""

    bridge: RoleChannel
    per_step: int
    lead_steps: int = 0
    told: int | None = None

    def ask(self, why: str) -> None:
        """A rank wants to leave."""
        self.bridge.place.store.set(REQUESTED_KEY, why)

    def step(self) -> int | None:
        """After how many steps the stream ends; None while it goes on. Equal on all ranks of the students after the same step."""
        store = self.bridge.place.store
        if self.told is None and store.check([LAST_STEP_KEY]):
            self.told = int(store.get(LAST_STEP_KEY))
        return self.told

    def why(self) -> str:
        """What the one said that asked."""
        return self.bridge.place.store.get(REQUESTED_KEY).decode()

    def limit(self, first: int, leaving: Preemption | None) -> int | None:
        """For the teacher, before the block that starts with microbatch `first`: where the ids end, or None. Reached by all its ranks.

        On the host: a small gloo broadcast beside the GPU's work.
        """
        store, box = self.bridge.place.store, torch.tensor([-1])
        if leaving is not None and leaving.signalled and not store.check([REQUESTED_KEY]):
            self.ask("SIGTERM on a rank of the teacher")
        if dist.get_rank() == 0 and store.check([REQUESTED_KEY]):
            box[0] = first // self.per_step + 1
            store.set(LAST_STEP_KEY, str(box.item()))
        if dist.get_world_size() > 1:
            dist.broadcast(box, src=0)
        return None if box.item() < 0 else int(box.item()) * self.per_step
