"""A Slurm cluster of two virtual nodes on this machine.

One controller and two node daemons run on ports of their own, with all files in one folder.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

NODES = ("n0", "n1")
GPUS = 8
MARK = "MINITRON_TEST_CLUSTER"
"""Environment variable of every process of a cluster; its value is the cluster's folder."""
PYXIS = Path(__file__).with_name("pyxis.c")
CONF = """ClusterName=minitron
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SchedulerParameters=sched_interval=1,bf_interval=1,requeue_delay=1
SlurmdTimeout=20
KillWait=5
MinJobAge=600
ReturnToService=2
MailProg=/bin/true
GresTypes=gpu
PlugStackConfig={root}/plugstack.conf
NodeName=n0 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000 Gres=gpu:{gpus}
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000 Gres=gpu:{gpus}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=other Nodes=ALL MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Install Debian's Slurm if it is missing; return the error, or None."""
    needed = ("slurmctld", "slurmd", "sbatch", "gcc")
    missing = [name for name in needed if not shutil.which(name)] + ["spank.h"] * (
        not Path("/usr/include/slurm/spank.h").exists()
    )
    if not missing:
        return None
    if not shutil.which("apt-get") or os.geteuid():
        return (
            f"no {', '.join(missing)}, and apt-get as root is needed to install "
            "slurm-wlm, libslurm-dev and gcc"
        )
    quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True, "text": True}
    # A policy of 101 prevents that the packages start their services.
    policy = Path("/usr/sbin/policy-rc.d")
    makes_policy = not policy.exists()
    if makes_policy:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        subprocess.run(["apt-get", "-qq", "update"], **quiet)
        done = subprocess.run(
            [
                "apt-get",
                "-qq",
                "install",
                "-y",
                "--no-install-recommends",
                "slurm-wlm",
                "libslurm-dev",
                "gcc",
                "libc6-dev",
            ],
            **quiet,
        )
    finally:
        if makes_policy:
            policy.unlink()
    return (
        f"apt-get cannot install slurm-wlm and libslurm-dev: {done.stderr.strip()[-300:]}"
        if done.returncode
        else None
    )


@dataclass
class Cluster:
    root: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    def run(self, *words: str | Path, timeout_s: float = 60, **variables: str) -> str:
        """Run a Slurm command, which must succeed; return its output."""
        done = subprocess.run(
            [*map(str, words)],
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=self.root / "jobs",
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str | Path, **variables: str) -> int:
        return int(self.run("sbatch", "--parsable", *words, **variables))

    def job(self, number: int) -> dict[str, str]:
        """Return the controller's fields of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", str(number))))

    def jobs(self) -> list[int]:
        return sorted(
            {int(number) for number in re.findall(r"JobId=(\d+)", self.run("scontrol", "show", "job", "-o"))}
        )

    def log(self, number: int) -> str:
        return "".join(path.read_text() for path in sorted((self.root / "jobs").glob(f"*{number}.out")))

    def ended(self, number: int) -> bool:
        return self.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def wait(self, condition: Callable[[], object], number: int, seconds: float = 150) -> None:
        """Wait until condition() is true; at the timeout, fail with the job's log."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (
                f"job {number} after {seconds:.0f} s: {self.job(number)}\n{self.log(number)}"
            )
            time.sleep(0.1)

    def log_ends(self) -> str:
        """Return the ends of the daemons' logs."""
        return "\n".join(
            f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(self.root.glob("*.log"))
        )

    def start(self, name: str) -> None:
        log = (self.root / f"{name}.log").open("a")
        words = ["slurmctld", "-D", "-c"] if name == "slurmctld" else ["slurmd", "-D", "-N", name]
        # setpriv kills them if this process ends.
        self.daemons[name] = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *words],
            env=self.environment,
            stdout=log,
            stderr=log,
            cwd=self.root,
        )

    def wait_until_up(self, seconds: float = 40) -> None:
        """Wait until all nodes are idle."""
        deadline = time.monotonic() + seconds
        while True:
            done = subprocess.run(
                ["sinfo", "-h", "-N", "-p", "batch", "-o", "%T"],
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=60,
            )
            if done.stdout.split() == ["idle"] * len(NODES):
                return
            assert time.monotonic() < deadline, (
                f"Slurm does not come up: {done.stdout}{done.stderr}\n{self.log_ends()}"
            )
            time.sleep(0.2)

    def lose(self, name: str) -> None:
        """Kill a node like a power failure: its daemon and all processes that it has started."""
        lost = {pid for pid, variables in self._processes() if variables.get("SLURMD_NODENAME") == name}
        lost |= {parent for pid in lost if (parent := _parent(pid)) > 1 and _name(parent) == "slurmstepd"}
        for pid in (self.daemons[name].pid, *lost):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons.pop(name).wait()

    def suspend(self, rank: int) -> None:
        """Stop a rank, so that it hangs."""
        (pid,) = [
            pid
            for pid, variables in self._processes()
            if variables.get("RANK") == str(rank) and not _is_rank(_parent(pid))
        ]
        os.kill(pid, signal.SIGSTOP)

    def _processes(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield pid and environment of all processes of this cluster."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                variables = dict(
                    text.split("=", 1)
                    for text in path.read_bytes().decode(errors="replace").split("\0")
                    if "=" in text
                )
                if variables.get(MARK) == str(self.root):
                    yield int(path.parent.name), variables

    def stop(self) -> None:
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
        for _ in range(50):
            if not (left := [pid for pid, _ in self._processes() if pid != os.getpid()]):
                break
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for daemon in self.daemons.values():
            daemon.wait(5)


def _is_rank(pid: int) -> bool:
    return b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()


def _parent(pid: int) -> int:
    return int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()).group(1))


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start a cluster; stop it with all its jobs at the end of the block."""
    root = Path(tempfile.mkdtemp(prefix="slurm"))
    try:
        for folder in ("state", "jobs", *(f"spool-{name}" for name in NODES), "dev"):
            (root / folder).mkdir()
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        (root / "slurm.conf").write_text(CONF.format(root=root, ports=_free_ports(3), user=user, gpus=GPUS))
        for number in range(GPUS):  # devices to allocate
            (root / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        (root / "gres.conf").write_text(f"NodeName=n[0-1] Name=gpu File={root}/dev/nvidia[0-{GPUS - 1}]\n")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", root / "pyxis.so", PYXIS], check=True)
        (root / "plugstack.conf").write_text(f"required {root}/pyxis.so\n")
        made = Cluster(root, clean(os.environ) | {"SLURM_CONF": str(root / "slurm.conf"), MARK: str(root)})
        try:
            for name in ("slurmctld", *NODES):
                made.start(name)
            made.wait_until_up()
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)


def clean(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment without variables of a surrounding job or launcher."""
    foreign = re.compile(
        r"(SLURM|SBATCH|SRUN|MINITRON|TORCHELASTIC)_|(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT)$"
    )
    return {name: value for name, value in environment.items() if not foreign.match(name)}
