"""A SLURM of one node, started from Debian's packages: no systemd, no cgroups, nothing outside one folder.

Everything it has is its own: ports, munge's socket and key, spool folders, logs. A SLURM that the machine has
already is not touched. GPUs are files that stand for devices: SLURM hands them out as it would real ones.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
GPUS = 2
NODE = "localhost"
CPUS, MEMORY_MB = 16, 64_000  # as declared, not as the machine has: nothing enforces them
PORTS = range(20_000, 30_000)
"""Below those of outgoing connections: one of these could take the port of a daemon that restarts."""
PATIENCE_S = 120  # until a daemon has started, answers or has ended: of a machine that is busy otherwise
NO_ANSWER = ("Unable to contact slurm controller", "Socket timed out")
PASSING = ("CONFIGURING", "RUNNING", "COMPLETING")
"""States that a job leaves by itself, whatever happens to its node's queue."""

SLURM_CONF = """\
ClusterName=t2v
SlurmctldHost={node}
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
# No systemd and no cgroups: processes are found by descent, and nothing is accounted for.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=1,sched_interval=2
GresTypes=gpu
# Who had which GPU, and from when to when: what the tests hold the workflow to.
Prolog={folder}/prolog
Epilog={folder}/epilog
PrologFlags=Alloc
KillWait=5
# A batch may be slow to start on a busy machine; SLURM would give it up after ten seconds.
BatchStartTimeout=120
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={node} CPUs={cpus} RealMemory={memory_MB} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""
# Debian 12's SLURM looks for a cgroup file system unless told not to; later ones have `disabled`.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"
NOTE = """\
#!/bin/sh
echo "{what} $SLURM_JOB_ID $SLURM_JOB_GPUS $(date +%s.%N)" >> {folder}/allocations
"""


@dataclass(frozen=True)
class Job:
    """What SLURM says of a job."""

    fields: dict[str, str]

    @property
    def id(self) -> str:
        return self.fields["JobId"]

    @property
    def state(self) -> str:
        return self.fields["JobState"]

    @property
    def submitted(self) -> str:
        return self.fields["SubmitTime"]

    @property
    def ended(self) -> str:
        return self.fields["EndTime"]

    @property
    def minutes(self) -> int:
        """The time limit."""
        days, _, clock = self.fields["TimeLimit"].rpartition("-")
        hours, minutes, seconds = (int(part) for part in clock.split(":"))
        return (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)

    @property
    def memory_MB(self) -> float:
        """The host memory that it asked for; SLURM prints whole gigabytes as such."""
        number, unit = self.fields["MinMemoryNode"][:-1], self.fields["MinMemoryNode"][-1]
        return float(number) * {"M": 1, "G": 1024}[unit]

    @property
    def gpus(self) -> str:
        """The GPUs that it asked for, as SLURM says it; empty for none."""
        return self.fields.get("TresPerJob", "")


@dataclass(frozen=True)
class Allocation:
    """One job's time on one GPU, by the clock of the node's own prolog and epilog."""

    job: str
    gpu: str
    start_s: float
    end_s: float


def unavailable() -> str | None:
    """Why there can be no SLURM here, or None."""
    if os.geteuid() != 0:
        return "starting SLURM's daemons needs root (in a container, say)"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        packages = "slurmctld slurmd slurm-client munge"
        return f"{', '.join(missing)} missing: apt-get install --no-install-recommends {packages}"
    return None


def _free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on, chosen at random: other clusters start at the same time."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"fewer than {count} of the ports {PORTS.start} to {PORTS.stop - 1} are free")


class Cluster:
    """The daemons. Use it as a context manager; :attr:`variables` lead SLURM's commands to it."""

    def __init__(self) -> None:
        # Not pytest's folder: munge wants no group or other to write above its socket, whose path is short.
        self.folder = Path(tempfile.mkdtemp(prefix="t2v-slurm-", dir="/var/tmp"))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of whoever talks to it.

        Snakemake's job step takes ``SLURM_CONF`` out of the environment, as all that SLURM set for the job.
        The ``srun`` that it calls must find the configuration all the same: a small one of ours comes first.
        """
        path = [str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": os.pathsep.join(path)}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start_munge()
            self.start_controller()
            self.start_node()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("slurmd", "slurmctld", "munged"):
            self._stop(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        controller_port, node_port = _free_ports(2)
        values = {
            "folder": folder,
            "node": NODE,
            "controller_port": controller_port,
            "node_port": node_port,
            "cpus": CPUS,
            "memory_MB": MEMORY_MB,
            "gpus": GPUS,
        }
        (folder / "slurm.conf").write_text(SLURM_CONF.format(**values))
        (folder / "cgroup.conf").write_text(CGROUP_CONF)
        devices = ("/dev/null", "/dev/zero")
        lines = [f"NodeName={NODE} Name=gpu File={device}\n" for device in devices[:GPUS]]
        (folder / "gres.conf").write_text("".join(lines))
        for what, name in (("start", "prolog"), ("end", "epilog")):
            (folder / name).write_text(NOTE.format(what=what, folder=folder))
            (folder / name).chmod(0o755)
        srun = folder / "bin" / "srun"
        srun.parent.mkdir()
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
        srun.chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

    def _start_munge(self) -> None:
        own = {name: self.folder / f"munge.{name}" for name in ("socket", "key", "pid", "log", "seed")}
        options = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log"}
        arguments = [f"--{option}={own[name]}" for option, name in options.items()]
        self._start("munged", "munged", "--foreground", "--force", *arguments, f"--seed-file={own['seed']}")
        self._wait("munge's socket", own["socket"].exists)

    def start_controller(self) -> None:
        """Start slurmctld, from what it saved if it ran before."""
        self._start("slurmctld", "slurmctld", "-D")
        self._wait("the controller", lambda: self._run("scontrol", "ping").returncode == 0)

    def stop_controller(self) -> None:
        """End slurmctld, as an update of the cluster does; jobs go on."""
        self._stop("slurmctld")

    def start_node(self) -> None:
        """Start slurmd, at first or after :meth:`fail_node`."""
        self._start("slurmd", "slurmd", "-D", "-N", NODE)
        self._wait("node that takes jobs", self._takes_jobs)

    def _takes_jobs(self) -> bool:
        """Whether the node is up: idle, or already at work on what had waited for it."""
        return self.ask("sinfo", "-h", "-o", "%t").startswith(("idle", "mix", "alloc"))

    def fail_node(self) -> None:
        """End slurmd and all that runs on the node at once and without a word, as a power cut does.

        The controller notices by itself only after ``SlurmdTimeout``, five minutes: it is told.
        """
        daemon = self._daemons.pop("slurmd")
        # First whoever would tell the controller that a job ended.
        jobs = sorted(self._processes_of_jobs(), key=lambda process: "slurmstepd" not in process.name())
        for process in [psutil.Process(daemon.pid), *jobs]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        daemon.wait()
        self.set_node("down")

    def _processes_of_jobs(self) -> list[psutil.Process]:
        """What runs in this cluster's jobs, and slurmstepd above it, whose environment is unreadable."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                variables = process.environ()
                ours = variables.get("SLURM_CONF") == str(self.folder / "slurm.conf")
                if ours and "SLURM_JOB_ID" in variables:
                    above = [p for p in process.parents() if "slurmstepd" in p.name()]
                    found |= {p.pid: p for p in (*above, process)}
        return list(found.values())

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                env=os.environ | self.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _stop(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _wait(self, what: str, there: Callable[[], bool]) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while not there():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > until_s:
                logs = "\n".join(path.read_text(errors="replace") for path in self.folder.glob("*.out"))
                raise RuntimeError(f"SLURM: no {what} ({'; '.join(dead) or 'too slow'}):\n{logs[-4000:]}")
            time.sleep(0.1)

    # --- asking and telling it -------------------------------------------------------------------

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=os.environ | self.variables, capture_output=True, text=True)

    def ask(self, *command: str) -> str:
        """What one of SLURM's commands prints; an error of it is raised, unless it is a busy controller's."""
        until_s = time.monotonic() + PATIENCE_S
        done = self._run(*command)
        while done.returncode and any(text in done.stderr for text in NO_ANSWER):
            if time.monotonic() > until_s:
                break
            time.sleep(1)
            done = self._run(*command)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def set_node(self, state: str) -> None:
        """Drain or resume the node."""
        self.ask("scontrol", "update", f"nodename={NODE}", f"state={state}", "reason=a test")

    def jobs(self, rule: str = "measure_batch") -> list[Job]:
        """The jobs that were submitted for a rule, oldest first."""
        found = []
        for line in self.ask("scontrol", "show", "job", "--oneliner").splitlines():
            fields = dict(re.findall(r"(\S+?)=(\S*)", line))
            if f"/rule_{rule}/" in fields.get("StdOut", ""):
                found.append(Job(fields))
        return sorted(found, key=lambda job: int(job.id))

    def settled_jobs(self) -> list[Job]:
        """:meth:`jobs`, once none runs or is being cleaned up after: the epilogs have run, too."""
        self._wait("jobs that have ended", lambda: not any(job.state in PASSING for job in self.jobs()))
        return self.jobs()

    def allocations(self) -> list[Allocation]:
        """Every GPU that a job had and gave back."""
        begun: dict[str, tuple[str, float]] = {}
        found = []
        for line in (self.folder / "allocations").read_text().splitlines():
            what, job, *rest = line.split()
            if what == "start":
                begun[job] = (rest[0] if len(rest) > 1 else "", float(rest[-1]))
            elif job in begun:
                gpu, start_s = begun.pop(job)
                found.append(Allocation(job, gpu, start_s, float(rest[-1])))
        return found
