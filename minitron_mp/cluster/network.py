"""What the ranks of a job have between them: ports, collectives, clocks and one file system. Each check ends, whatever is broken.

Until there is a process group everything goes through the job's store, which the launcher has connected already.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minitron_mp.cluster.findings import Finding, Verdict

PATIENCE_S = 20.0
"""For another rank, where nothing is to be computed; a network file system may hold back what others wrote for some seconds."""

LAUNCHER_PORT = 29500
"""torchrun's, unless --rdzv-endpoint or --standalone says otherwise."""

RENAMES, FILE_BYTES = 30, 1 << 14

CLOCK_WARNING_S, CLOCK_FAILED_S = 1.0, 60.0
"""Above the second, files look as if they came from the future, and a deadline on one rank is not the scheduler's."""


@dataclass(frozen=True)
class RankTable:
    """This process among all ranks of the job; store: torch.distributed's."""

    store: Any
    rank: int = 0
    size: int = 1
    host: str = ""

    def wait(self, key: str, timeout_s: float = PATIENCE_S) -> str | None:
        """What some rank has said under this key; None when it does not in time."""
        with suppress(dist.DistError, RuntimeError):
            self.store.wait([key], timedelta(seconds=timeout_s))
            return self.store.get(key).decode()
        return None

    def silent(self, topic: str, timeout_s: float = PATIENCE_S) -> list[int]:
        """Ranks that have not said `topic/RANK` in time."""
        deadline = time.monotonic() + timeout_s
        return [
            rank
            for rank in range(self.size)
            if self.wait(f"{topic}/{rank}", max(0.05, deadline - time.monotonic())) is None
        ]

    def hosts(self) -> list[str]:
        """Host of each rank, "" for those that say nothing; reached by all ranks, and all hold the result."""
        self.store.set(f"host/{self.rank}", self.host)
        silent = self.silent("host")
        return [
            "" if rank in silent else self.store.get(f"host/{rank}").decode() for rank in range(self.size)
        ]


def ports(job: RankTable, timeout_s: float = 5.0, launcher_port: int = LAUNCHER_PORT) -> list[Finding]:
    """Whether the next rank's host accepts a connection to a port of its choice, as gloo and NCCL need it; reached by all ranks."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        cure = "add it to the DNS or to /etc/hosts, or name the interface: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        job.store.set(f"port/{job.rank}", "")
        return [
            Finding(
                "ports",
                "failed" if job.size > 1 else "warning",
                f"the name of this host, {name}, does not resolve: {error}",
                cure,
            )
        ]
    found = []
    with socket.create_server(("", 0)) as listener:
        job.store.set(f"port/{job.rank}", f"{address} {listener.getsockname()[1]}")
        peer = (job.rank + 1) % job.size
        at = job.wait(f"port/{peer}")
        try:
            if not at:
                raise OSError("it says no port")
            host, port = at.split()
            socket.create_connection((host, int(port)), timeout_s).close()
        except OSError as error:
            cure = "open all TCP ports between the nodes of a job; if the name of a host is 127.0.x.x in its /etc/hosts, give it its real address"
            found.append(
                Finding(
                    "ports",
                    "failed",
                    f"rank {job.rank} ({job.host}) does not reach rank {peer} at {at or 'any address'}: {error}",
                    cure,
                )
            )
        job.store.set(f"reached/{job.rank}", "1")
        job.wait(f"reached/{(job.rank - 1) % job.size}")  # whoever connects to this listener has done so
    if job.size == 1:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", launcher_port)) == 0:
                cure = f"for a second job on this host: torchrun --standalone, or --rdzv-endpoint={name}:{launcher_port + 1}"
                found.append(
                    Finding(
                        "ports", "warning", f"port {launcher_port}, the launcher's usual one, is taken", cure
                    )
                )
    return found or [
        Finding(
            "ports",
            "ok",
            "every rank reaches the next one" if job.size > 1 else f"{name} ({address}) accepts connections",
        )
    ]


def links(job: RankTable, device: torch.device) -> list[Finding]:
    """All-reduce and a ring of sends over the default process group: right sums, time, GB/s. Reached by all ranks; all hold the result."""
    if job.size == 1:
        return [Finding("all-reduce", "ok", "one rank, nothing to send")]
    on_gpu = device.type == "cuda"
    backend = "NCCL" if on_gpu else "gloo"
    num_bytes = (256 << 20) if on_gpu else (4 << 20)

    def timed(action: Callable[[], None]) -> float:
        """Seconds of the slowest rank, the best of three."""
        best = float("inf")
        for _ in range(3):
            _meet()
            start = time.perf_counter()
            action()
            if on_gpu:
                torch.cuda.synchronize(device)
            slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            best = min(best, slowest.item())
        return best

    mine = torch.full((num_bytes // 4,), float(job.rank + 1), device=device)
    dist.all_reduce(mine)
    if not torch.equal(mine, torch.full_like(mine, job.size * (job.size + 1) / 2)):
        return [
            Finding(
                "all-reduce",
                "failed",
                f"wrong sums on rank {job.rank} ({job.host})",
                "look for a broken link or GPU: NCCL_DEBUG=INFO, dcgmi diag",
            )
        ]
    seconds = timed(lambda: dist.all_reduce(mine))
    speed = 2 * (job.size - 1) / job.size * num_bytes / seconds / 1e9
    what = f"{backend}, {job.size} ranks on {len(set(job.hosts()))} hosts, {num_bytes >> 20} MiB: {seconds * 1e3:.1f} ms, {speed:.2f} GB/s on the bus"
    slow = on_gpu and speed < 5
    cure = (
        "slower than one 50 Gbit/s link; NCCL_DEBUG=INFO says whether it went over sockets (NET/Socket)"
        if slow
        else ""
    )
    found = [Finding("all-reduce", "warning" if slow else "ok", what, cure)]
    sent, received = torch.full_like(mine, job.rank), torch.empty_like(mine)
    to, source = (job.rank + 1) % job.size, (job.rank - 1) % job.size

    def ring() -> None:
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, sent, to), dist.P2POp(dist.irecv, received, source)]
        ):
            work.wait()

    seconds = timed(ring)
    if not torch.equal(received, torch.full_like(received, source)):
        return [
            *found,
            Finding(
                "point to point",
                "failed",
                f"rank {job.rank} got something else than rank {source} sent",
                "as above",
            ),
        ]
    what = f"{backend}, each rank to the next, {num_bytes >> 20} MiB: {seconds * 1e3:.1f} ms, {num_bytes / seconds / 1e9:.2f} GB/s"
    return [*found, Finding("point to point", "ok", what)]


def _meet() -> None:
    """A barrier on the CPU side of the default group, where NCCL's would wait for the GPU."""
    dist.all_reduce(torch.zeros(1))


def clocks(job: RankTable, clock: Callable[[], float] = time.time) -> Finding:
    """How far the ranks' clocks are apart, to the time of a small all-reduce. Reached by all ranks; all hold the result."""
    best: list[float] | None = None
    for _ in range(5):
        mine = torch.zeros(job.size, dtype=torch.float64)
        _meet()
        mine[job.rank] = clock()
        dist.all_reduce(mine)
        if best is None or max(mine) - min(mine) < max(best) - min(best):
            best = mine.tolist()
    assert best is not None
    skew, middle = max(best) - min(best), sorted(best)[(len(best) - 1) // 2]
    where = job.hosts()
    if skew <= CLOCK_WARNING_S:
        return Finding("clocks", "ok", f"{skew * 1e3:.1f} ms apart at most")
    off = max(range(job.size), key=lambda rank: abs(best[rank] - middle))
    verdict: Verdict = "failed" if skew > CLOCK_FAILED_S else "warning"
    return Finding(
        "clocks",
        verdict,
        f"{skew:.1f} s apart, rank {off} ({where[off]}) most",
        "synchronise the nodes' clocks (chrony or ntpd; chronyc tracking)",
    )


def shared(folder: Path, job: RankTable) -> list[Finding]:
    """Whether the ranks see one folder, and a replaced file as either the old or the new one, whole; reached by all ranks.

    Rank 0 replaces a file over and over while all ranks read it; then it renames a folder, as artefacts are finished, and each rank
    leaves a file for rank 0. Everything lies in a folder of its own, which goes again, as do those above it that were not there.
    """
    new = [above for above in (folder, *folder.parents) if not above.exists()]
    if job.rank == 0:
        scratch = folder / f".doctor-{uuid.uuid4().hex[:8]}"
        try:
            scratch.mkdir(parents=True)
            _replace(scratch / "file", 0)
        except OSError as error:
            job.store.set("scratch", "")
            return [
                Finding(
                    "file system",
                    "failed",
                    f"{folder} cannot be written: {error}",
                    "set another output, or make it writable for this user",
                )
            ]
        job.store.set("scratch", str(scratch))
    if not (told := job.wait("scratch")):
        return []  # rank 0 has the reason
    scratch, problems = Path(told), []
    try:
        reading = threading.Thread(target=lambda: problems.extend(_read_while_replaced(scratch / "file")))
        reading.start()
        job.store.set(f"reads/{job.rank}", "1")
        if job.rank == 0:
            job.silent("reads")
            for count in range(1, RENAMES + 1):
                _replace(scratch / "file", count)
                time.sleep(0.002)
            (scratch / "aside").mkdir()
            (scratch / "aside").rename(scratch / "in place")
            job.store.set("renamed", "1")
        reading.join()
        if (
            not problems
            and job.wait("renamed")
            and not _appears(lambda: (scratch / "in place").is_dir() and not (scratch / "aside").exists())
        ):
            problems.append(f"a renamed folder does not appear within {PATIENCE_S:.0f} s")
        with suppress(OSError):
            _replace(scratch / f"rank{job.rank}", RENAMES)
        job.store.set(f"left/{job.rank}", "1")
        if job.rank == 0:
            job.silent("left")
            if not _appears(
                lambda: all((scratch / f"rank{rank}").exists() for rank in range(job.size)),
                PATIENCE_S if job.size > 1 else 0,
            ):
                missing = [str(rank) for rank in range(job.size) if not (scratch / f"rank{rank}").exists()]
                problems.append(f"rank 0 does not see what ranks {', '.join(missing)} write")
    finally:
        if job.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            with suppress(OSError):  # somebody has put something there
                for above in new:
                    above.rmdir()
    if problems:
        cure = "put output on a file system that all nodes share, with POSIX renames (Lustre, GPFS, NFS without nosharecache; no object store)"
        return [Finding("file system", "failed", f"{folder}: {problem}", cure) for problem in problems]
    return [
        Finding(
            "file system",
            "ok",
            f"{folder}: one folder for all ranks, renames are atomic"
            if job.size > 1
            else f"{folder}: renames are atomic",
        )
    ]


def _replace(path: Path, count: int) -> None:
    """The way artifact.write_bytes() does it."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_bytes(bytes([count]) * FILE_BYTES)
    os.replace(aside, path)


def _read_while_replaced(path: Path) -> list[str]:
    """What a reader sees that it must not, until the last replacement; [] when all is well."""
    last, deadline = 0, time.monotonic() + PATIENCE_S
    while last < RENAMES:
        if time.monotonic() > deadline:
            return [f"this rank does not see what rank 0 writes within {PATIENCE_S:.0f} s"]
        time.sleep(0.001)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            if last:
                return ["a file that is replaced is gone for a moment"]
            continue  # another node may see a new folder late
        except OSError:  # a stale handle of NFS: opened anew the next time
            continue
        if len(content) != FILE_BYTES or len(set(content)) > 1:
            return ["a file that is replaced is seen half-written"]
        if content[0] < last:
            return ["a file that is replaced is seen as it was before"]
        last = content[0]
    return []


def _appears(there: Callable[[], bool], patience_s: float = PATIENCE_S) -> bool:
    deadline = time.monotonic() + patience_s
    while not there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
