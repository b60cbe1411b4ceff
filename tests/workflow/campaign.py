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
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
if __name__ != "__mp_main__":  # helper processes import the main module again, and must start quickly
    from forked_job import Job, filled, tmpfs
    from tiny import make_model, make_recipe_file, make_text, read_metrics

LAYOUT = ("parallel.tp=2", "parallel.sequence_parallel=true", "distill.async_save=true")
STAGES = ("import", "data", "score", "plan", "prune", "distill", "evaluate", "export")
TARGETS = ("import", "score", "prune", "distill", "save", "export")
"""Moments of a fault. "save": while a checkpoint or the student is written."""
HIDDEN = (".metadata", ".text_hashes.json")
"""Hidden files that belong to an output folder."""
SIGNALS = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}
"""Kinds of faults that end a job in an orderly way."""


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

    def _start(self, output: Path) -> Job:
        arguments = ["compress", str(self._recipe(output)), *LAYOUT]
        return Job(arguments, self.root / f"{output.name}.log")

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
            half = [*output.glob("checkpoints/distill/.step_*.tmp"), *output.glob(".student_distilled.tmp")]
            # A killed job may have left half a checkpoint.
            return any(_modified_s(path) > job.started for path in half)
        number = STAGES.index(target)
        before = f"{STAGES[number - 1]}: {output}" if number else "the run can be stopped"
        text = job.log.read_text()
        return before in text or f"{STAGES[number - 1]}: done" in text

    def _check_stopped(self, output: Path, fault: Fault) -> None:
        """After an interrupt or SIGTERM there is neither a lock nor half an artifact."""
        half = [path.name for path in output.rglob(".*") if path.name not in HIDDEN]
        if half:
            self.result.problems.append(f"{fault}: left on disk: {half}")

    def _check_end(self, job: Job, fault: Fault | None) -> None:
        text = job.log.read_text()
        left = job.left_behind()
        if left:
            self.result.problems.append(f"{fault}: processes are left behind: {left}")
        if job.hangs:
            self.result.problems.append(f"{fault}: the job hangs: {text[-6000:]}")
        if "Traceback" in text:
            self.result.problems.append(f"{fault}: a traceback: {text[-1500:]}")
        if fault and fault.kind == "full disk" and fault.hit and "error: " not in text:
            self.result.problems.append(f"{fault}: no error message: {text[-1500:]}")

    def _compare(self, output: Path) -> None:
        content = self._content(output)
        for name, value in self.reference.items():
            if content[name] != value:
                self.result.problems.append(f"{output.name}: {name} differs from the undisturbed run")
        hidden = [str(path.relative_to(output)) for path in output.rglob(".*") if path.name not in HIDDEN]
        if hidden or (output / "checkpoints").exists():
            self.result.problems.append(f"{output.name}: left on disk: {hidden or ['checkpoints']}")

    def random_faults(self, kinds: list[str]) -> list[Fault]:
        """Return a fault of each kind at different moments, in the order of the stages."""
        targets = sorted(self.chance.sample(TARGETS, len(kinds)), key=TARGETS.index)
        faults = []
        for kind, target in zip(kinds, targets):
            longest = 0.05 if target == "save" else self.durations[target]
            faults.append(Fault(kind, target, self.chance.uniform(0, longest)))
        return faults


def _modified_s(path: Path) -> float:
    """Return the time of the last change, 0 if the file does not exist any more."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def run_campaign(root: Path, counts: dict[str, int], seed: int = 1) -> Result:
    """Run a campaign in a folder. counts: kind of fault -> number that must be hit.

    A project has up to one fault of each of TARGETS. A fault whose moment had passed is repeated.
    """
    campaign = Campaign(root, seed)
    with contextlib.ExitStack() as stack:
        disk = root / "disk"
        if counts.get("full disk") and not stack.enter_context(tmpfs(disk)):
            raise PermissionError("full disks need the right to mount a tmpfs")
        disk.mkdir(exist_ok=True)
        pending = [kind for kind, count in counts.items() for _ in range(count)]
        for number in range(4 + len(pending)):
            if not pending:
                break
            kinds = campaign.chance.sample(pending, min(len(pending), len(TARGETS)))
            faults = campaign.random_faults(kinds)
            campaign.run(disk / f"run{number}", faults, disk)
            for fault in faults:
                if fault.hit:
                    pending.remove(fault.kind)
            shutil.rmtree(disk / f"run{number}", ignore_errors=True)
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
