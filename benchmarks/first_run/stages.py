"""Stages of a first run: commands with a time limit, of which none can block the next one.

A stage runs in its own session with a mark in its environment. After it, and when its time is up,
every process with the mark is killed, also workers of torchrun, which have their own sessions.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

MARK = "MINITRON_FIRST_RUN"
OK, FAILED, TIMED_OUT = "ok", "failed", "timed out"
NO_TIME = "no time left"
LEAST_S = 10.0
"""A stage with less time than this is not started."""

Reader = Callable[[Path], dict[str, Any]]


def read_nothing(folder: Path) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Stage:
    """One command.

    shows: what its result means. command: words; "{folder}" is the stage's own folder, "{output}"
    the one of the run. limit_s: time limit. read: function of the stage's folder, which has the
    file `log`, that returns numbers. with_file: option and file that are added if the file exists,
    because an earlier stage has written it. together: stages in succession with the same word run side by
    side. accepted: exit codes that are a success. missing: why this machine cannot run it, or "".
    """

    name: str
    shows: str
    command: tuple[str, ...]
    limit_s: float
    read: Reader = read_nothing
    together: str = ""
    accepted: tuple[int, ...] = (0,)
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""
    with_file: tuple[str, str] | None = None


@dataclass
class Running:
    """A started stage."""

    stage: Stage
    folder: Path
    process: subprocess.Popen[bytes]
    mark: str
    started: float
    limit_s: float

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def ended(self) -> bool:
        return self.process.poll() is not None

    def late(self) -> bool:
        return time.monotonic() - self.started > self.limit_s


def run_stages(
    stages: Sequence[Stage], output: Path, deadline: float, save: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Run all stages and return their results, in order. A failure does not end the run.

    deadline: time.monotonic() at which the last stage ends. save: called with the results so far
    whenever a stage has ended.
    """
    found: dict[str, dict[str, Any]] = {}

    def add(stage: Stage, result: dict[str, Any]) -> None:
        found[stage.name] = result
        print(line_of(result), flush=True)
        save([found[each.name] for each in stages if each.name in found])

    for batch in batches(stages):
        running = []
        for stage in batch:
            left = deadline - time.monotonic()
            if stage.missing or left < LEAST_S:
                add(stage, entry(stage, stage.missing or NO_TIME))
            else:
                running.append(start(stage, output, min(stage.limit_s, left)))
        while running:
            for each in [each for each in running if each.ended() or each.late()]:
                running.remove(each)
                add(each.stage, finish(each))
            time.sleep(0.05)
    return [found[stage.name] for stage in stages]


def batches(stages: Sequence[Stage]) -> Iterator[list[Stage]]:
    """Yield the stages that run side by side."""
    for word, group in groupby(stages, key=lambda stage: stage.together):
        members = list(group)
        yield from [members] if word else [[stage] for stage in members]


def start(stage: Stage, output: Path, limit_s: float) -> Running:
    folder = output / stage.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark = f"{stage.name}-{os.getpid()}"
    words = list(stage.command)
    if stage.with_file and Path(filled(stage.with_file[1], folder, output)).exists():
        words += stage.with_file
    words = [filled(word, folder, output) for word in words]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | stage.environment | {MARK: mark},
            start_new_session=True,
        )
    return Running(stage, folder, process, mark, time.monotonic(), limit_s)


def filled(word: str, folder: Path, output: Path) -> str:
    return word.replace("{folder}", str(folder)).replace("{output}", str(output))


def finish(running: Running) -> dict[str, Any]:
    """Return the result of a stage that has ended, or that is killed because its time is up."""
    stage, seconds, late = running.stage, time.monotonic() - running.started, not running.ended()
    left_behind = kill_marked(running.mark, wait_s=0 if late else 2)
    running.process.wait()
    code = running.process.returncode
    result = TIMED_OUT if late else OK if code in stage.accepted else FAILED
    numbers: dict[str, Any] = {}
    try:
        numbers = stage.read(running.folder)
    except Exception as error:  # a reader must not end the run
        numbers = {"unreadable": f"{type(error).__name__}: {error}"}
        result = FAILED if result == OK else result
    if left_behind and not late:
        numbers["left_behind"] = left_behind
    if result == OK and numbers.get("nothing_ran"):
        result = f"nothing ran: {numbers['nothing_ran']}"
    return entry(stage, result) | {
        "rc": None if late else code,
        "seconds": round(seconds, 1),
        "limit_s": round(running.limit_s, 1),
        "command": " ".join(running.process.args),  # type: ignore[arg-type]
        "log": str(running.log),
        "numbers": numbers,
        "last_lines": last_lines(running.log),
    }


def entry(stage: Stage, result: str) -> dict[str, Any]:
    return {
        "name": stage.name,
        "shows": stage.shows,
        "result": result,
        "rc": None,
        "seconds": 0.0,
        "numbers": {},
    }


def kill_marked(mark: str, wait_s: float) -> list[str]:
    """Kill all processes with this mark. Return the names of those that were alive after wait_s.

    A process that its parent has left needs a moment to end by itself.
    """
    deadline = time.monotonic() + wait_s
    while (found := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
    return [name for process in found if (name := name_of(process))]


def marked(mark: str) -> list[int]:
    """Return the living processes whose environment has the mark."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def name_of(process: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()[:100]
    return ""


def last_lines(log: Path, count: int = 12) -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    return [line[:200] for line in lines if line.strip()][-count:]


def line_of(result: dict[str, Any]) -> str:
    """One line of the log of the run."""
    last = result.get("last_lines") or [""]
    code = "" if result["rc"] in (None, 0) else f", exit code {result['rc']}"
    seconds = f"{result['seconds']:6.1f} s" if result.get("command") else " " * 8
    text = last[-1].strip()[:70] if result["result"] in (OK, FAILED, TIMED_OUT) else ""
    return f"{result['name']:22} {seconds}  {result['result']}{code}  {text}".rstrip()
