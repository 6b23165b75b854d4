"""What a record says of the machine, the software and who else was on the GPU."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import psutil

from t2v_energy.measurement.record import Environment, Gpu, Neighbour, Process
from t2v_energy.metering.nvml import NvmlDevice

PACKAGES = ("t2v-energy", "torch", "diffusers", "transformers", "codecarbon", "nvidia-ml-py", "numpy")


def versions() -> dict[str, str]:
    """Versions of what decides speed and energy: packages, CUDA and cuDNN."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    import torch

    found["torch"] = torch.__version__
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def git_commit(root: Path) -> str:
    """The commit of the workflow, with ``-dirty`` if tracked files differ; ``unknown`` outside git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("T2V_ENERGY_COMMIT", "unknown")


def cpu_model() -> str:
    """The CPU's name as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def foreign_processes(device: NvmlDevice) -> list[Process]:
    """Processes on the GPU that are neither ours nor our children's.

    Inside a container NVML may give process ids of the host's namespace; ours cannot then be told
    from others, so before our own process has opened the GPU this must be asked (see the runner).
    """
    ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    return [Process(pid=pid, used_MiB=used) for pid, used in device.processes() if pid not in ours]


def describe_gpu(device: NvmlDevice) -> Gpu:
    """The GPU's identity and limits."""
    return Gpu(
        name=device.name,
        uuid=device.uuid,
        driver=device.driver,
        power_limit_W=device.power_limit_W(),
        memory_total_MiB=device.memory_total_MiB(),
    )


def describe(
    root: Path, gpu: Gpu | None, weights: str, foreign: list[Process], neighbours: Sequence[Neighbour] = ()
) -> Environment:
    """The whole environment, as a record keeps it."""
    return Environment(
        host=socket.gethostname(),
        platform=platform.platform(),
        python=platform.python_version(),
        cpu=cpu_model(),
        cpu_count=os.cpu_count() or 1,
        memory_GiB=psutil.virtual_memory().total / 2**30,
        gpu=gpu,
        versions=versions(),
        git_commit=git_commit(root),
        weights=weights,
        foreign_processes=foreign,
        neighbours=list(neighbours),
    )
