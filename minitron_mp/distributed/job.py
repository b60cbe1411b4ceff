"""Identity of this process and of its job, and processes that no launcher made ranks of.

It imports neither torch nor Megatron-Core.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from minitron_mp.console import launched, speaks
from minitron_mp.errors import InputError, TransientError

STOP_FILE = "stop"
"""Name of a file in the output folder that requests a stop. The job deletes it when it stops."""

TASKS = (
    ("Slurm", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
    ("Open MPI", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",)),
    ("MPI", "PMI_RANK", ("PMI_SIZE",)),
    ("Flux", "FLUX_TASK_RANK", ("FLUX_JOB_SIZE",)),
)
"""Launchers of plain processes: name, variable of the task number, variables of the number of
tasks. The first of these variables that is set counts."""


def require_launcher() -> None:
    """Raise InputError in one of several tasks of srun or mpirun that are not ranks of torchrun.

    Each of them would run the whole command in the same output folder. A shell that salloc started
    has no task number.
    """
    if launched():
        return
    for launcher, number, sizes in TASKS:
        size = next((os.environ[name] for name in sizes if name in os.environ), "1")
        if number in os.environ and size.isdigit() and int(size) > 1:
            raise InputError(
                f"this process is task {os.environ[number]} of {size} of {launcher}, but no rank: RANK is "
                "not set, so each task would run the whole command in one output folder; start torchrun once "
                "per node (launch/slurm.sbatch and launch/run.sh do), or start one task (srun --ntasks=1)"
            )


def begin_start() -> None:
    """Record a start of the ranks in a job of launch/slurm.sbatch, whose torchrun restarts them.

    SystemExit after an error that a restart does not change, and on rank 0 after too many restarts:
    torchrun counts the restarts of each node separately.
    """
    job_file = os.environ.get("MINITRON_JOB_FILE")
    if not job_file or not launched():
        return
    if _refusal_file(job_file).exists():
        raise SystemExit(2)
    if not speaks():
        return
    path = Path(job_file)
    num_restarts = len(list(path.parent.glob(f"{path.name}.start-*")))
    allowed = os.environ.get("MINITRON_RESTARTS", "")
    if allowed.isdigit() and num_restarts > int(allowed):
        raise SystemExit(f"error: restart {num_restarts} of at most {allowed} in this job")
    Path(f"{job_file}.start-{time.time_ns()}").touch()


def record_refusal(error: BaseException) -> None:
    """Record that a restart of the job does not help, if the error is one of the user's input.

    It does nothing for a TransientError, and for an error that a failure of the file system has
    caused. In a job without launch/slurm.sbatch it does nothing.
    """
    job_file = os.environ.get("MINITRON_JOB_FILE")
    is_usage = isinstance(error, SystemExit) and error.code == 2
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    is_transient = any(isinstance(each, (TransientError, OSError)) for each in causes)
    if job_file and (is_usage or (isinstance(error, InputError) and not is_transient)):
        with suppress(OSError):
            _refusal_file(job_file).touch()


def _refusal_file(job_file: str) -> Path:
    """Return the file by which launch/run.sh and the ranks report an invalid recipe or argument."""
    return Path(f"{job_file}.refused")


def raise_open_file_limit() -> None:
    """Raise this process's soft limit of open files to its hard limit.

    The usual soft limit of 1024 is too low for gloo, which opens a socket for each other rank.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # some systems limit it to less than they report
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def num_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_environment(num_threads: int) -> dict[str, str]:
    """Return the environment of a program that imports this package and tokenizes text.

    num_threads: threads of its tokenizer.
    """
    package_folder = str(Path(__file__).resolve().parents[2])
    paths = [package_folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TOKENIZERS_PARALLELISM": "true" if num_threads > 1 else "false",
        "RAYON_NUM_THREADS": str(num_threads),
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """In this context SIGTERM raises SystemExit in the main thread, so that clean-up code runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@dataclass(frozen=True)
class ProcessIdentity:
    """A process that other hosts and later processes can recognise.

    start_ticks: start of the process in the kernel's clock, because process ids are reused.
    kernel, namespace: identity of the table of processes that contains pid; "" if unknown.
    restart: number of times that the scheduler has restarted the job.
    """

    host: str
    pid: int
    start_ticks: str = ""
    kernel: str = ""
    namespace: str = ""
    job: str = ""
    restart: int = 0

    def values(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        job = f" of {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def this_process() -> ProcessIdentity:
    """Return the identity of this process."""
    job_id = os.environ.get("SLURM_JOB_ID", "")
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    kernel, namespace = _process_table()
    return ProcessIdentity(
        host=socket.gethostname(),
        pid=os.getpid(),
        start_ticks=_own_start_ticks(),
        kernel=kernel,
        namespace=namespace,
        job=f"Slurm job {job_id}" if job_id else "",
        restart=int(restart) if restart.isdigit() else 0,
    )


def is_alive(process: ProcessIdentity) -> bool | None:
    """Return whether a process is alive; None if this process cannot find out.

    The answer is certain in the same table of processes: same kernel and same namespace. A job that
    the scheduler has restarted has no older processes.
    """
    me = this_process()
    if process.job and process.job == me.job and process.restart < me.restart:
        return False
    if not process.kernel or (process.kernel, process.namespace) != (me.kernel, me.namespace):
        return None
    try:
        stat = _read_stat(process.pid)
    except OSError:  # no such process, or /proc hides those of other users (hidepid)
        return _exists(process.pid)
    return _start_ticks(stat) == process.start_ticks


def _process_table() -> tuple[str, str]:
    """Return the identity of the running kernel and of this process's namespace of process ids."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return kernel, os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""


def _own_start_ticks() -> str:
    """Return the start time of this process in clock ticks; "" if it is unknown."""
    try:
        return _start_ticks(_read_stat(os.getpid())) or ""
    except OSError:
        return ""


def _read_stat(pid: int) -> str:
    """Return the kernel's line about a process. OSError if there is none, or it is hidden."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")


def _exists(pid: int) -> bool:
    """Return whether a process exists, also one of another user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        pass
    return True


def _start_ticks(stat: str) -> str | None:
    """Return the start time of a process in clock ticks from its line; None for a zombie."""
    fields = stat.rpartition(")")[2].split()  # the name in parentheses may contain spaces
    state, start = fields[0], fields[19]
    return None if state in "ZX" else start
