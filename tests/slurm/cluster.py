"""A Slurm of its own on this machine: munge, a controller and two nodes, on free ports, in a folder of the test."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tests.distributed import free_port

NODES = ("near", "far")
DAEMONS = ("munged", "slurmctld", "slurmd")


class Cluster(NamedTuple):
    """A running Slurm."""

    folder: Path
    environment: Mapping[str, str]  # of its commands

    def ask(self, *words: str) -> str:
        """Run a command of Slurm, or one that uses them; its output."""
        done = subprocess.run(words, env=dict(self.environment), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def state(self, job: str) -> str:
        """State of a job, such as PENDING, RUNNING, COMPLETED; those of an array's tasks, once each."""
        shown = self.ask("scontrol", "show", "job", job, "--oneliner")
        words = {word for word in shown.split() if word.startswith("JobState=")}
        return " ".join(sorted(word.removeprefix("JobState=") for word in words))

    def restarts(self, job: str) -> int:
        """How often a job was queued again."""
        return int(self._field(job, "Restarts"))

    def seconds(self, job: str) -> int:
        """For how long a job has been running."""
        hours, minutes, seconds = self._field(job, "RunTime").split(":")
        return 3600 * int(hours) + 60 * int(minutes) + int(seconds)

    def _field(self, job: str, name: str) -> str:
        shown = self.ask("scontrol", "show", "job", job, "--oneliner").split()
        return next(word for word in shown if word.startswith(f"{name}=")).removeprefix(f"{name}=")

    def ranks(self, job: str) -> list[int]:
        """Processes of a job's ranks; all its nodes are this machine.

        A child that has not yet become its program looks like its rank, and Slurm may not reach it: it is left out.
        """
        mine = f"SLURM_JOB_ID={job}".encode()
        found: dict[int, int] = {}  # process -> parent
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                environment = (process / "environ").read_bytes().split(b"\0")
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it ended
                continue
            is_rank = b"RANK" in {entry.split(b"=")[0] for entry in environment}
            if mine in environment and is_rank and any(word.endswith(b"launcher/train.py") for word in words):
                found[int(process.name)] = parent
        return [process for process, parent in found.items() if parent not in found]

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        ends = [f"\n== {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in self.folder.glob("*.log")]
        return "".join(ends)


def until(what: str, holds: Callable[[], bool], seconds: float, told: Callable[[], str] = str) -> None:
    """Wait until something holds; fails the test after so many seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}\n{told()}"
        time.sleep(0.3)


@contextmanager
def asleep(processes: Sequence[int]) -> Iterator[None]:
    """Stop processes for a while; those that have been woken and have ended meanwhile are let go."""
    assert processes
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def is_untold(process: int, number: signal.Signals) -> bool:
    """Whether a process that was stopped has heard nothing: Slurm may wake it with the signal, or leave it asleep."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    except FileNotFoundError:  # woken, and at its end by now
        return False
    is_stopped = lines["State"].split()[0] == "T"
    return is_stopped and not int(lines["ShdPnd"], 16) & 1 << (number - 1)


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Start the daemons and end them; what jobs have left over ends with them."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    environment |= {"SLURM_CONF": str(_configured(folder)), "OMP_NUM_THREADS": "1"}
    cluster = Cluster(folder, environment)
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> None:
        program = shutil.which(words[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert program is not None, words[0]
        with (folder / f"{words[0]}.{len(daemons)}.log").open("wb") as log:
            command = [program, *words[1:]]
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))

    try:
        start("munged", "--foreground", "--force", *_munge_options(folder))
        until("munge", (folder / "munge.socket").exists, 20, cluster.logs)
        start("slurmctld", "-D", "-f", environment["SLURM_CONF"])
        for node in NODES:
            start("slurmd", "-D", "-N", node, "-f", environment["SLURM_CONF"])
        until("two idle nodes", lambda: _idle(cluster) == len(NODES), 60, cluster.logs)
        yield cluster
    finally:
        if len(daemons) > 1:
            _end_jobs(cluster)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _end_jobs(cluster: Cluster) -> None:
    run = {"env": dict(cluster.environment), "capture_output": True, "text": True, "timeout": 30}
    subprocess.run(["scancel", "--user", getpass.getuser()], **run)  # type: ignore[call-overload]
    deadline = time.monotonic() + 40  # KillWait and some
    while subprocess.run(["squeue", "-h"], **run).stdout.strip() and time.monotonic() < deadline:  # type: ignore[call-overload]
        time.sleep(0.3)


def _idle(cluster: Cluster) -> int:
    shown = subprocess.run(
        ["sinfo", "-h", "-N", "-o", "%T"], env=dict(cluster.environment), capture_output=True, text=True, timeout=30
    )
    return shown.stdout.split().count("idle")


def _munge_options(folder: Path) -> list[str]:
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "daemon.log", "seed-file": "seed"}
    return [f"--{option}={folder}/munge.{end}" for option, end in files.items()]


def _configured(folder: Path) -> Path:
    """Write slurm.conf. Both nodes are this machine; a job that is queued again starts within seconds."""
    host, ports = socket.gethostname().split(".")[0], [free_port() for _ in range(1 + len(NODES))]
    values = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmUser": getpass.getuser(),
        "SlurmdUser": getpass.getuser(),
        "SlurmctldPort": ports[0],
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool.%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.%n.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SchedulerParameters": "sched_interval=2,bf_interval=2,batch_sched_delay=0",
        "JobAcctGatherType": "jobacct_gather/none",
        "SwitchType": "switch/none",
        "ReturnToService": 2,
        "KillWait": 30,
    }
    lines = [f"{key}={value}" for key, value in values.items()]
    for node, port in zip(NODES, ports[1:], strict=True):
        lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN")
        (folder / f"spool.{node}").mkdir()
    lines.append(f"PartitionName=main Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP")
    (folder / "state").mkdir()
    path = folder / "slurm.conf"
    path.write_text("\n".join(lines) + "\n")
    return path
