"""Start and end of a job, and its process groups. The only user of parallel_state and of the launch environment.

A job has one world, or one for each role (teacher, students). Megatron-Core calls collectives on the default process group, in
its optimizer and all over its checkpoints, so every role has a default group of its own; rank 0 is the first of the role. The
ranks of all roles are joined by a Bridge. Everything meets in the store of the job, under a prefix of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from minitron_mp.distributed.launcher import JobRank
from minitron_mp.errors import InputError


@dataclass
class RoleChannel:
    """What joins the ranks of all roles of a job. Job ranks number them through: each role is a span of them.

    data: raw process group, NCCL on GPUs; control: raw gloo group, for small messages. They know only .send and .recv with lists
    of one tensor, a job rank and a tag, and .barrier.
    """

    role: str
    place: JobRank
    spans: dict[str, range]
    data: Any
    control: Any
    timeout: timedelta
    device: torch.device
    side_stream: Any = field(default=None)

    @property
    def rank(self) -> int:
        """Of this process, in the job."""
        return self.place.rank

    def stream(self, *, behind_current: bool = True) -> Any:
        """Context in which transfers are issued: a stream of their own on a GPU, behind what this thread has issued so far."""
        if self.device.type != "cuda":
            return nullcontext()
        self.side_stream = self.side_stream or torch.cuda.Stream(self.device, priority=-1)
        if behind_current:
            self.side_stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.side_stream)

    def computed(self) -> None:
        """Wait on the host for what was issued on the current stream."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def used_by_stream(self, tensor: torch.Tensor) -> None:
        """Its memory is not given to others before stream() is done with it."""
        if self.side_stream is not None:
            tensor.record_stream(self.side_stream)

    def abort(self) -> None:
        """Give up on transfers and collectives under way: on a GPU a kernel that waits for a dead rank would hold up the end of this one."""
        if self.device.type == "cuda":
            with suppress(Exception):
                self.data.abort()
                dist.distributed_c10d._abort_process_group()

    def record_event(self) -> Any:
        """What the receiving stream waits for; None on a CPU."""
        return self.side_stream.record_event() if self.side_stream is not None else None

    def report(self, reason: str) -> str:
        """Tell all ranks why the job fails; the first reason that any rank gave."""
        try:
            return self.place.store.compare_set("failed", "", reason).decode()
        except dist.DistError:  # the process that holds the store is gone
            return reason

    def reason(self, wait_s: float = 0.0) -> str | None:
        """Why the job fails, if a rank has said so within so many seconds."""
        deadline = time.monotonic() + wait_s
        with suppress(dist.DistError):
            while True:
                if self.place.store.check(["failed"]):
                    return self.place.store.get("failed").decode()
                if time.monotonic() >= deadline:
                    return None
                time.sleep(0.05)
        return None

    def blame(self, rank: int, text: str, grace_s: float = 1.0) -> str:
        """This rank's wait for another has failed with this text; the text of the rank that waits for one that waits for nobody."""
        store, chain = self.place.store, [self.rank]
        with suppress(dist.DistError):
            store.set(f"waits/{self.rank}", json.dumps([rank, text]))
            self.reason(grace_s)  # one that knows more may say it; and the others may say for whom they wait
            while rank not in chain and store.check([f"waits/{rank}"]):
                chain.append(rank)
                rank, text = json.loads(store.get(f"waits/{rank}"))
        return text

    def meet(self, topic: str) -> None:
        """Wait for all ranks of the job, for ever: they may have hours of other work. RuntimeError when one fails instead."""
        store = self.place.store
        store.add(topic, 1)
        while store.add(topic, 0) < self.place.size:
            if reason := self.reason():
                raise RuntimeError(reason)
            time.sleep(0.05)

    def exchange(
        self, topic: str, mine: Any, *, timeout_s: float | None = 0, roles: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Every role's value (json) of a topic, by role, on every rank; rank 0 of a role speaks for it. InputError when one fails instead.

        roles: that take part, default all. timeout_s: default the bridge's; None: for ever, where the others may be at work for hours before they come.
        """
        store, limit = self.place.store, timeout_s or self.timeout.total_seconds()
        if dist.get_rank() == 0:
            store.set(f"{topic}/{self.role}", json.dumps(mine))
        keys, start = {role: f"{topic}/{role}" for role in roles or self.spans}, time.monotonic()
        while not store.check(list(keys.values())):
            if reason := self.reason():
                raise InputError(reason)
            if timeout_s is not None and time.monotonic() - start > limit:
                missing = ", ".join(role for role, key in keys.items() if not store.check([key]))
                raise InputError(self.report(f"{missing} did not say its {topic} within {limit:.0f} s"))
            time.sleep(0.05)
        return {role: json.loads(store.get(key)) for role, key in keys.items()}
