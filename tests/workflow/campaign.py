"""Campaign of faults: a job of two ranks is killed, or its disk fills up, at random moments.

    python tests/workflow/campaign.py --kills 30 --full-disks 10 --seed 1

The same command is started again after each fault, until it finishes. Then the loss curve and the
exported weights must be bitwise identical to those of an undisturbed run, no temporary file may be
left, and every process must have ended. Ranks are forked from a server that has imported torch and
Megatron-Core, with the environment that torchrun would give them. They run the command line.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
if __name__ != "__mp_main__":  # helper processes import the main module again, and must start quickly
    import psutil
    from pool import PRELOADED
    from tiny import make_model, make_recipe_file, make_text, read_metrics

RANKS = 2
LAYOUT = ("parallel.tp=2", "parallel.sequence_parallel=true", "distill.async_save=true")
STAGES = ("import", "data", "score", "plan", "prune", "distill", "evaluate", "export")
TARGETS = ("import", "score", "prune", "distill", "save", "export")
"""Moments of a fault. "save": while a checkpoint or the student is written."""
LEFT_BEHIND_S = 10.0
"""Time after which no process of a killed rank may be alive."""
RUN_S = 180.0
SIGNALS = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}
"""Kinds of faults that end a job in an orderly way."""
DISK_BYTES = 64 << 20


@dataclass
class Fault:
    """One fault and how the job reacted. after_s: delay after the moment began."""

    kind: str
    target: str
    after_s: float
    hit: bool = False
    exit_code: int | None = None
    seconds: float = 0.0


@dataclass
class Result:
    """The result of a campaign."""

    faults: list[Fault] = field(default_factory=list)
    missed: int = 0
    problems: list[str] = field(default_factory=list)

    def count(self, kind: str) -> int:
        return sum(1 for fault in self.faults if fault.kind == kind and fault.hit)


def rank_main(rank: int, port: int, arguments: list[str], log: str, file_limit: int | None) -> None:
    """Main function of a rank: the command line with torchrun's environment."""
    os.setsid()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        PYTHONWARNINGS="ignore",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        LOCAL_WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        COLUMNS="160",
    )
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    import torch

    torch.set_num_threads(1)
    from minitron_mp.cli import main

    sys.argv = ["minitron-mp", *arguments]
    main()


class Job:
    """A running job of RANKS ranks."""

    def __init__(self, arguments: list[str], log: Path, file_limit: int | None = None):
        self.log = log
        log.write_text("")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        forkserver.set_forkserver_preload(PRELOADED)
        self.ranks = [
            context.Process(target=rank_main, args=(rank, port, arguments, str(log), file_limit))
            for rank in range(RANKS)
        ]
        for rank in self.ranks:
            rank.start()
        self.sessions = [rank.pid for rank in self.ranks]

    @property
    def running(self) -> bool:
        return all(rank.is_alive() for rank in self.ranks)

    def wait(self, condition: Callable[[], bool], timeout_s: float = RUN_S) -> bool:
        """Wait until the condition is true. Return False if the job ends before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self.running or time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def end(self) -> int:
        """Wait for the ranks as torchrun does: after the first failure it stops all others."""
        deadline = time.monotonic() + RUN_S
        while self.running and time.monotonic() < deadline:
            time.sleep(0.01)
        codes = [rank.exitcode for rank in self.ranks]
        if any(codes):
            for number, wait_s in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0)):
                for rank in self.ranks:
                    if rank.is_alive():
                        os.kill(rank.pid, number)
                for rank in self.ranks:
                    rank.join(wait_s)
        for rank in self.ranks:
            rank.join(max(0.1, deadline - time.monotonic()))
        return next((code for code in codes if code), 0)

    def processes(self) -> list[psutil.Process]:
        """Return all living processes of the sessions of the ranks."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) in self.sessions and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def left_behind(self) -> list[str]:
        """Return the processes that are alive LEFT_BEHIND_S after the ranks have ended."""
        deadline = time.monotonic() + LEFT_BEHIND_S
        while (found := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        names = []
        for process in found:
            with contextlib.suppress(psutil.Error):
                names.append(" ".join(process.cmdline())[:100])
                process.kill()
        return names


class Campaign:
    """The undisturbed run, and runs of the same recipe with faults."""

    def __init__(self, root: Path, seed: int):
        self.root, self.chance, self.result = root, random.Random(seed), Result()
        make_model(root / "model")
        make_text(root / "text")
        self.durations: dict[str, float] = {}
        self.reference = self._undisturbed()

    def _recipe(self, output: Path) -> Path:
        return make_recipe_file(
            self.root / f"{output.name}.yaml", self.root / "model", self.root / "text", output,
            distill={"steps": 12, "checkpoint_interval": 3},
        )  # fmt: skip

    def _start(self, output: Path, file_limit: int | None = None) -> Job:
        arguments = ["compress", str(self._recipe(output)), *LAYOUT]
        return Job(arguments, self.root / f"{output.name}.log", file_limit)

    def _undisturbed(self) -> dict[str, Any]:
        job = self._start(self.root / "undisturbed")
        last = time.monotonic()
        for stage in STAGES:
            job.wait(
                lambda stage=stage: f"\n{stage}: {self.root / 'undisturbed'}/" in "\n" + job.log.read_text()
            )
            self.durations[stage] = time.monotonic() - last
            last = time.monotonic()
        code = job.end()
        assert code == 0, job.log.read_text()
        return self._content(self.root / "undisturbed")

    def _content(self, output: Path) -> dict[str, Any]:
        """Return what must be bitwise identical: loss curve and exported files."""
        hashes = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((output / "student_hf").glob("*.safetensors"))
        }
        return {"curve": read_metrics(output / "student_distilled"), "weights": hashes}

    def run(self, output: Path, faults: list[Fault], disk: Path) -> None:
        """Run one project with faults, restart it after each, and compare it at the end.

        disk: file system of the output, which a fault fills up.
        """
        for fault in faults:
            start = time.monotonic()
            job = self._start(output)
            fault.hit = self._wait_for(job, output, fault)
            if fault.hit and fault.kind == "kill":
                os.kill(self.chance.choice(job.ranks).pid, signal.SIGKILL)
                fault.exit_code = job.end()
            elif fault.hit and fault.kind in SIGNALS:
                for rank in job.ranks:  # a terminal sends Ctrl-C, and Slurm SIGTERM, to all processes
                    os.kill(rank.pid, SIGNALS[fault.kind])
                fault.exit_code = job.end()
                self._check_stopped(output, fault)
            elif fault.hit:
                with filled(
                    disk, self.chance.choice([0, 0, *map(self.chance.randrange, (1 << 16, 1 << 19))])
                ):
                    fault.exit_code = job.end()
                fault.hit = fault.exit_code != 0
            else:
                fault.exit_code = job.end()
            fault.seconds = time.monotonic() - start
            self._check_end(job, fault)
            self.result.faults.append(fault)
            self.result.missed += not fault.hit
        job = self._start(output)
        if job.end() != 0:
            self.result.problems.append(f"{output.name} does not finish: {job.log.read_text()[-1500:]}")
            return
        self._check_end(job, None)
        self._compare(output)

    def _wait_for(self, job: Job, output: Path, fault: Fault) -> bool:
        """Wait for the moment of a fault. Return False if the job ends before."""
        if not job.wait(lambda: self._has_begun(job, output, fault.target)):
            return False
        time.sleep(fault.after_s)
        return job.running

    def _has_begun(self, job: Job, output: Path, target: str) -> bool:
        if target == "save":
            checkpoints = output.glob("checkpoints/distill/.step_*.tmp")
            return any(checkpoints) or (output / ".student_distilled.tmp").exists()
        number = STAGES.index(target)
        before = f"{STAGES[number - 1]}: {output}" if number else "the run can be stopped"
        text = job.log.read_text()
        return before in text or f"{STAGES[number - 1]}: done" in text

    def _check_stopped(self, output: Path, fault: Fault) -> None:
        """After an interrupt or SIGTERM there is neither a lock nor half an artifact."""
        half = [path.name for path in output.rglob(".*") if path.name not in (".metadata",)]
        if half:
            self.result.problems.append(f"{fault}: left on disk: {half}")

    def _check_end(self, job: Job, fault: Fault | None) -> None:
        text = job.log.read_text()
        left = job.left_behind()
        if left:
            self.result.problems.append(f"{fault}: processes are left behind: {left}")
        if "Traceback" in text:
            self.result.problems.append(f"{fault}: a traceback: {text[-1500:]}")
        if fault and fault.kind == "full disk" and fault.hit and "error: " not in text:
            self.result.problems.append(f"{fault}: no error message: {text[-1500:]}")

    def _compare(self, output: Path) -> None:
        content = self._content(output)
        for name, value in self.reference.items():
            if content[name] != value:
                self.result.problems.append(f"{output.name}: {name} differs from the undisturbed run")
        hidden = [str(path.relative_to(output)) for path in output.rglob(".*") if path.name != ".metadata"]
        if hidden or (output / "checkpoints").exists():
            self.result.problems.append(f"{output.name}: left on disk: {hidden or ['checkpoints']}")

    def random_faults(self, kind: str, targets: list[str]) -> list[Fault]:
        """Return one fault for each target, in the order of the stages, at random delays."""
        faults = []
        for target in targets:
            longest = 0.05 if target == "save" else self.durations[target]
            faults.append(Fault(kind, target, self.chance.uniform(0, longest)))
        return faults


@contextlib.contextmanager
def tmpfs(folder: Path) -> Iterator[bool]:
    """Mount a small file system at the folder. Yield False if this user may not do that."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=False)


@contextlib.contextmanager
def filled(folder: Path, free_bytes: int) -> Iterator[None]:
    """Fill a file system up to a number of free bytes, in this context."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        room = max(0, shutil.disk_usage(folder).free - free_bytes)
        with contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(1, room))
    try:
        yield
    finally:
        filler.unlink()


def run_campaign(root: Path, counts: dict[str, int], seed: int = 1) -> Result:
    """Run a campaign in a folder. counts: kind of fault -> number."""
    campaign = Campaign(root, seed)
    chance, number = campaign.chance, 0
    for kind, count in counts.items():
        with contextlib.ExitStack() as stack:
            disk = root
            if kind == "full disk" and count:
                disk = root / "disk"
                if not stack.enter_context(tmpfs(disk)):
                    campaign.result.problems.append("full disks need the right to mount a tmpfs")
                    break
            while campaign.result.count(kind) < count and number < 4 * sum(counts.values()):
                number += 1
                missing = count - campaign.result.count(kind)
                targets = sorted(chance.sample(TARGETS, min(len(TARGETS), missing)), key=TARGETS.index)
                output = disk / f"run{number}"
                campaign.run(output, campaign.random_faults(kind, targets), disk)
                shutil.rmtree(output, ignore_errors=True)
    return campaign.result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--full-disks", type=int, default=10)
    parser.add_argument("--interrupts", type=int, default=0)
    parser.add_argument("--terminations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        counts = {
            "kill": options.kills,
            "full disk": options.full_disks,
            "interrupt": options.interrupts,
            "terminate": options.terminations,
        }
        result = run_campaign(Path(folder), counts, seed=options.seed)
    for fault in result.faults:
        print(
            f"{fault.kind:10} {fault.target:8} after {fault.after_s:6.3f} s: "
            f"{'hit' if fault.hit else 'missed'}, exit code {fault.exit_code}, {fault.seconds:.1f} s"
        )
    reached = ", ".join(f"{result.count(kind)} x {kind}" for kind in counts)
    print(
        f"{reached}; {result.missed} missed, "
        f"{len(result.problems)} problems, {time.monotonic() - start:.0f} s"
    )
    for problem in result.problems:
        print("problem:", problem)
    sys.exit(1 if result.problems else 0)


if __name__ == "__main__":
    main()
