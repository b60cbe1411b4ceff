"""RoleChannel: communication between the ranks of all roles of a job (teacher, students).

The channel has two raw process groups over all ranks of the job, and the job's store. The store is
for small messages between roles and for the reason of a failure.

When a wait times out, gloo closes all connections of the group. So "connection closed" on a rank
does not show the cause. find_root_cause() first collects the reports of all waiting ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from minitron_mp.distributed.launcher import JobRank
from minitron_mp.distributed.process_groups import abort_groups, shut_down
from minitron_mp.errors import OtherRankError

POLL_S = 0.05
"""Seconds between two reads of the store."""

FAILURE_KEY = "failed"
"""Key in the store: the reason of the first failure."""


@dataclass
class RoleChannel:
    """The ranks of all roles of a job. Each role is a span of job ranks.

    role: role of this rank. job: this rank in the job, and the job's store.
    data, control: raw process groups over all job ranks. data is NCCL on GPUs. control is gloo, for
        small messages. They support only send and recv, with a list of one tensor, a job rank and
        a tag.
    timeout: timeout of every wait for another rank.
    """

    role: str
    job: JobRank
    spans: dict[str, range]
    data: dist.ProcessGroup
    control: dist.ProcessGroup
    timeout: timedelta
    device: torch.device
    side_stream: torch.cuda.Stream | None = field(default=None, init=False)

    @property
    def rank(self) -> int:
        """Job rank of this process."""
        return self.job.rank

    @property
    def store(self) -> dist.Store:
        """Store of the job."""
        return self.job.store

    def transfer_stream(self, *, behind_current: bool = True) -> AbstractContextManager[object]:
        """Return the context in which transfers are issued: on a GPU, a separate CUDA stream.

        behind_current: the transfers start after the work that this thread has issued before.
        """
        if self.device.type != "cuda":
            return nullcontext()
        self.side_stream = self.side_stream or torch.cuda.Stream(self.device, priority=-1)
        if behind_current:
            self.side_stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.side_stream)

    def synchronize(self, event: torch.cuda.Event | None = None) -> None:
        """Wait on the host for an event. Default: the work that was issued on the current stream."""
        if event is not None:
            event.synchronize()
        elif self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def record_stream(self, tensor: torch.Tensor) -> None:
        """Keep the memory of a tensor until the transfer stream has finished with it."""
        if self.side_stream is not None:
            tensor.record_stream(self.side_stream)

    def record_event(self) -> torch.cuda.Event | None:
        """Return an event after the transfers issued so far; None on a CPU."""
        return self.side_stream.record_event() if self.side_stream is not None else None

    def abort(self) -> None:
        """Abort transfers and collectives in progress.

        Otherwise the process could not end while a GPU kernel waits for a dead rank.
        """
        if self.device.type == "cuda":
            abort_groups(self.device, [self.data])

    def shutdown(self) -> None:
        """Shut the groups down. All ranks of the job call it after the last transfer.

        Without it a group of NCCL ends when Python collects it, at another time on each rank, and
        waits there for the other ranks of the node.
        """
        shut_down(self.data, self.device)
        self.control.shutdown()

    def report_failure(self, reason: str) -> str:
        """Write the reason of a failure, unless the store has one; return the stored reason."""
        try:
            return self.store.compare_set(FAILURE_KEY, "", reason).decode()
        except dist.DistError:  # the process that holds the store has ended
            return reason

    def failure(self, wait_s: float = 0.0) -> str | None:
        """Return the reason of the failure, or None if no rank reports one within `wait_s`."""
        deadline = time.monotonic() + wait_s
        with suppress(dist.DistError):
            while True:
                if self.store.check([FAILURE_KEY]):
                    return self.store.get(FAILURE_KEY).decode()
                if time.monotonic() >= deadline:
                    return None
                time.sleep(POLL_S)
        return None

    def find_root_cause(self, rank: int, text: str, grace_s: float = 1.0) -> str:
        """Report that this rank timed out waiting for `rank`. Return the text of the root cause.

        Each rank writes the rank that it waits for. The function follows this chain to a rank that
        has written nothing: that rank is dead or hangs. text: error text of this rank's wait.
        """
        chain = [self.rank]
        with suppress(dist.DistError):
            self.store.set(f"waits/{self.rank}", json.dumps([rank, text]))
            self.failure(grace_s)  # meanwhile the other ranks write their waits, or the reason
            while rank not in chain and self.store.check([f"waits/{rank}"]):
                chain.append(rank)
                rank, text = json.loads(self.store.get(f"waits/{rank}"))
        return text

    def barrier(self, topic: str) -> None:
        """Wait for all ranks of the job, without a timeout, because a rank may work for hours.

        RuntimeError when a rank fails.
        """
        self.store.add(topic, 1)
        while self.store.add(topic, 0) < self.job.size:
            reason = self.failure()
            if reason:
                raise RuntimeError(reason)
            time.sleep(POLL_S)

    def exchange(
        self, topic: str, value: object, *, timeout_s: float | None = 0, roles: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Return {role: its value} of a topic, on every rank. Rank 0 of each role writes its value.

        value: value of this rank's role, as JSON types.
        roles: roles that take part. Default: all roles.
        timeout_s: 0 for the timeout of the channel, None to wait without a timeout (a role may work
            for hours before it takes part).
        OtherRankError when a rank fails, or when a role does not write its value in time.
        """
        store = self.store
        limit_s = timeout_s or self.timeout.total_seconds()
        if dist.get_rank() == 0:
            store.set(f"{topic}/{self.role}", json.dumps(value))
        keys = {role: f"{topic}/{role}" for role in roles or self.spans}
        start = time.monotonic()
        while not store.check(list(keys.values())):
            reason = self.failure()
            if reason:
                raise OtherRankError(reason)
            if timeout_s is not None and time.monotonic() - start > limit_s:
                missing = ", ".join(role for role, key in keys.items() if not store.check([key]))
                text = f"no {topic} from {missing} within {limit_s:.0f} s; check that its ranks are running"
                raise OtherRankError(self.report_failure(text))
            time.sleep(POLL_S)
        return {role: json.loads(store.get(key)) for role, key in keys.items()}
