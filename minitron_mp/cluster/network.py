"""Checks between the ranks of a job: ports, collectives and clocks.

Every check has a timeout. Before a process group exists, ranks exchange results through the job's
store, to which the launcher has already connected them.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from minitron_mp.cluster.checks import CheckResult, failed, ok, warning
from minitron_mp.distributed.process_groups import host_barrier, host_group

STORE_TIMEOUT_S = 20.0
"""Timeout for a result of another rank that computes nothing. Network file systems may delay files by
seconds.
"""

LAUNCHER_PORT = 29500
"""Default port of torchrun without --rdzv-endpoint or --standalone."""

CLOCK_WARNING_S = 1.0

CLOCK_FAILED_S = 60.0
"""A larger difference gives files with times in the future, and different deadlines on the ranks."""

MIN_BUS_GB_S = 5.0
"""Slower collectives on GPUs cause a warning, because one link of 50 Gbit/s is faster."""


@dataclass(frozen=True)
class RankTable:
    """The rank of this process in the job, and the store of the job."""

    store: dist.Store
    rank: int = 0
    size: int = 1
    host: str = ""

    def wait(self, key: str, timeout_s: float = STORE_TIMEOUT_S) -> str | None:
        """Wait for the value of a key that any rank sets; return None after the timeout."""
        with suppress(dist.DistError, RuntimeError):
            self.store.wait([key], timedelta(seconds=timeout_s))
            return self.store.get(key).decode()
        return None

    def missing_ranks(self, topic: str, timeout_s: float = STORE_TIMEOUT_S) -> list[int]:
        """Return the ranks that do not set `topic/RANK` before the timeout."""
        deadline = time.monotonic() + timeout_s
        missing = []
        for rank in range(self.size):
            remaining_s = max(0.05, deadline - time.monotonic())
            if self.wait(f"{topic}/{rank}", remaining_s) is None:
                missing.append(rank)
        return missing

    def hosts(self) -> list[str]:
        """Return the host of each rank, or "" for a rank that does not set it before the timeout.

        Called by all ranks. All ranks return the result.
        """
        self.store.set(f"host/{self.rank}", self.host)
        missing = self.missing_ranks("host")
        return [
            "" if rank in missing else self.store.get(f"host/{rank}").decode() for rank in range(self.size)
        ]


def check_ports(
    job: RankTable, timeout_s: float = 5.0, launcher_port: int = LAUNCHER_PORT
) -> list[CheckResult]:
    """Check that the next rank's host accepts a connection on a free port.

    gloo and NCCL need such connections. Called by all ranks.
    """
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        job.store.set(f"port/{job.rank}", "")
        detail = f"this host's name, {name}, cannot be resolved: {error}"
        advice = (
            "add it to the DNS or to /etc/hosts, or set the interface: GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME"
        )
        return [CheckResult("ports", "failed" if job.size > 1 else "warning", detail, advice)]
    results = []
    with socket.create_server(("", 0)) as listener:
        job.store.set(f"port/{job.rank}", f"{address} {listener.getsockname()[1]}")
        problem = _connection_problem(job, timeout_s)
        if problem:
            results.append(problem)
        job.store.set(f"reached/{job.rank}", "1")
        job.wait(
            f"reached/{(job.rank - 1) % job.size}"
        )  # the previous rank has connected, so the listener can close
    if job.size == 1:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", launcher_port)) == 0:
                advice = (
                    "for a second job on this host: torchrun --standalone, or "
                    f"--rdzv-endpoint={name}:{launcher_port + 1}"
                )
                detail = f"port {launcher_port}, the launcher's default, is in use"
                results.append(warning("ports", detail, advice))
    if results:
        return results
    if job.size > 1:
        return [ok("ports", "every rank can connect to the next one")]
    return [ok("ports", f"{name} ({address}) accepts connections")]


def _connection_problem(job: RankTable, timeout_s: float) -> CheckResult | None:
    """Connect to the next rank; return the problem, if there is one."""
    peer = (job.rank + 1) % job.size
    peer_address = job.wait(f"port/{peer}")
    try:
        if not peer_address:
            raise OSError("that rank reports no port")
        host, port = peer_address.split()
        socket.create_connection((host, int(port)), timeout_s).close()
    except OSError as error:
        return failed(
            "ports",
            f"rank {job.rank} ({job.host}) cannot connect to rank {peer} at "
            f"{peer_address or 'any address'}: {error}",
            "open all TCP ports between the nodes of a job; if a host's /etc/hosts maps its name to "
            "127.0.x.x, set the real address there",
        )
    return None


def check_collectives(job: RankTable, device: torch.device) -> list[CheckResult]:
    """Check an all-reduce and a ring of sends on the default process group: results, time, GB/s.

    Called by all ranks. All ranks return the result.
    """
    if job.size == 1:
        return [ok("all-reduce", "one rank, no communication")]
    backend = "NCCL" if device.type == "cuda" else "gloo"
    num_bytes = (256 << 20) if device.type == "cuda" else (4 << 20)
    values = torch.full((num_bytes // 4,), float(job.rank + 1), device=device)
    dist.all_reduce(values)
    if not torch.equal(values, torch.full_like(values, job.size * (job.size + 1) / 2)):
        return [
            failed(
                "all-reduce",
                f"wrong sums on rank {job.rank} ({job.host})",
                "look for a broken link or GPU: NCCL_DEBUG=INFO, dcgmi diag",
            )
        ]
    seconds = _slowest_rank_s(lambda: dist.all_reduce(values), device)
    speed = 2 * (job.size - 1) / job.size * num_bytes / seconds / 1e9
    detail = (
        f"{backend}, {job.size} ranks on {len(set(job.hosts()))} hosts, {num_bytes >> 20} MiB: "
        f"{seconds * 1e3:.1f} ms, {speed:.2f} GB/s bus bandwidth"
    )
    if device.type == "cuda" and speed < MIN_BUS_GB_S:
        advice = (
            "slower than one link of 50 Gbit/s; NCCL_DEBUG=INFO shows whether NCCL uses sockets (NET/Socket)"
        )
        return [warning("all-reduce", detail, advice), _check_ring(job, values, backend)]
    return [ok("all-reduce", detail), _check_ring(job, values, backend)]


def _check_ring(job: RankTable, values: torch.Tensor, backend: str) -> CheckResult:
    """Send a tensor to the next rank and check the tensor from the previous rank."""
    sent = torch.full_like(values, job.rank)
    received = torch.empty_like(values)
    target = (job.rank + 1) % job.size
    source = (job.rank - 1) % job.size

    def ring() -> None:
        transfers = [dist.P2POp(dist.isend, sent, target), dist.P2POp(dist.irecv, received, source)]
        for work in dist.batch_isend_irecv(transfers):
            work.wait()

    seconds = _slowest_rank_s(ring, values.device)
    if not torch.equal(received, torch.full_like(received, source)):
        detail = f"rank {job.rank} received wrong values from rank {source}"
        return failed("point to point", detail, "look for a broken link or GPU: NCCL_DEBUG=INFO, dcgmi diag")
    speed = values.nbytes / seconds / 1e9
    return ok(
        "point to point",
        f"{backend}, each rank to the next, {values.nbytes >> 20} MiB: {seconds * 1e3:.1f} ms, "
        f"{speed:.2f} GB/s",
    )


def _slowest_rank_s(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the slowest rank in the best of three runs."""
    best = float("inf")
    for _ in range(3):
        host_barrier()
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=host_group())
        best = min(best, slowest.item())
    return best


def check_clocks(job: RankTable, clock: Callable[[], float] = time.time) -> CheckResult:
    """Check how much the ranks' clocks differ, to the accuracy of a small all-reduce.

    Called by all ranks. All ranks return the result.
    """
    best: list[float] = []
    for _ in range(5):
        times = torch.zeros(job.size, dtype=torch.float64)
        host_barrier()
        times[job.rank] = clock()
        dist.all_reduce(times, group=host_group())
        if not best or times.max().item() - times.min().item() < max(best) - min(best):
            best = times.tolist()
    skew = max(best) - min(best)
    if skew <= CLOCK_WARNING_S:
        return ok("clocks", f"differ by at most {skew * 1e3:.1f} ms")
    median = sorted(best)[(len(best) - 1) // 2]
    worst = max(range(job.size), key=lambda rank: abs(best[rank] - median))
    detail = f"differ by {skew:.1f} s, most on rank {worst} ({job.hosts()[worst]})"
    advice = "synchronise the nodes' clocks (chrony or ntpd; chronyc tracking)"
    if skew > CLOCK_FAILED_S:
        return failed("clocks", detail, advice)
    return warning("clocks", detail, advice)
