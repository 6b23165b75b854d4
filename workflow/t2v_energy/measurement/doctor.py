"""Tells, before a campaign, what this machine can and cannot measure, and what each lack means."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

from t2v_energy.errors import UserError

if TYPE_CHECKING:
    from t2v_energy.metering.nvml import NvmlDevice

RAPL = Path("/sys/class/powercap")
WATCH_S = 3.0


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    state: Literal["ok", "lacking", "blocking"]
    found: str
    meaning: str = ""


def examine(folder: Path) -> list[Finding]:
    """Every check, each in its own words; ``folder`` is where records would go."""
    checks: list[Callable[[], list[Finding]]] = [
        _packages,
        _gpu,
        _kernels,
        _cpu_energy,
        lambda: _disk(folder),
    ]
    return [finding for check in checks for finding in check()]


def _packages() -> list[Finding]:
    missing = []
    for name in ("torch", "diffusers", "transformers", "codecarbon", "nvidia-ml-py", "ftfy"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        meaning = (
            "nothing can be measured here; pip install -e '.[measure]' (the analysis needs none of them)"
        )
        return [Finding("packages", "blocking", f"missing: {', '.join(missing)}", meaning)]
    return [
        Finding(
            "packages", "ok", f"torch {metadata.version('torch')}, diffusers {metadata.version('diffusers')}"
        )
    ]


def _gpu() -> list[Finding]:
    from t2v_energy.measurement.gpus import choose_gpu

    try:
        device = choose_gpu()
    except UserError as error:
        meaning = f"only CPU campaigns (smoke) can be measured here, without GPU energy. {error.remedy}"
        return [Finding("GPU", "lacking", error.what, meaning)]
    with device:
        found = [
            Finding("GPU", "ok", f"{device.name}, {device.uuid}, driver {device.driver}"),
            Finding("power limit", "ok", f"{device.power_limit_W():.0f} W"),
        ]
        found.append(_others(device))
        return found + _counter(device) + _sensors(device)


def _others(device: NvmlDevice) -> Finding:
    subject, processes = "GPU is ours alone", [pid for pid, _ in device.processes()]
    if not processes:
        return Finding(subject, "ok", "no other process")
    meaning = "measuring is refused while they run; --allow-shared measures, and the records are invalid"
    return Finding(subject, "lacking", f"processes {processes}", meaning)


def _counter(device: NvmlDevice) -> list[Finding]:
    """Watch the energy counter flat out: how often it changes, and by how little."""
    try:
        changes, values = [], [device.energy_mJ()]
    except UserError as error:
        meaning = "no GPU energy can be measured on this GPU: campaigns on it are refused"
        return [Finding("energy counter", "blocking", error.what, meaning)]
    end_s = time.monotonic() + WATCH_S
    while time.monotonic() < end_s:
        value = device.energy_mJ()
        if value != values[-1]:
            changes.append(time.monotonic())
            values.append(value)
        time.sleep(0.0005)
    if len(changes) < 3:
        return [Finding("energy counter", "blocking", f"changed {len(changes)} times in {WATCH_S:.0f} s",
                        "it does not count: GPU energy cannot be measured")]  # fmt: skip
    period_s = median(b - a for a, b in pairwise(changes))
    quantum_mJ = min(b - a for a, b in pairwise(values))
    meaning = f"windows are read between ticks; below about {4 * period_s:.1f} s a window's interval widens"
    return [
        Finding(
            "energy counter",
            "ok",
            f"ticks every {period_s * 1e3:.0f} ms, smallest step {quantum_mJ} mJ",
            meaning,
        )
    ]


def _sensors(device: NvmlDevice) -> list[Finding]:
    sample = device.sample()
    lacking = [name for name, value in sample._asdict().items() if value is None]
    if lacking:
        meaning = "the counter cannot be checked against power, or throttling not be seen, without these"
        return [Finding("sensors", "lacking", f"missing: {', '.join(lacking)}", meaning)]
    return [
        Finding(
            "sensors",
            "ok",
            f"{sample.power_instant_W:.0f} W, {sample.temperature_C} °C, {sample.sm_clock_MHz} MHz",
        )
    ]


def _kernels() -> list[Finding]:
    try:
        from t2v_energy.measurement.kernels import available
    except ImportError:
        return []
    kernels = available()
    there = [name for name, works in kernels.items() if works]
    lacking = [name for name, works in kernels.items() if not works]
    meaning = f"configurations that ask for {', '.join(lacking)} cannot run here" if lacking else ""
    return [Finding("attention kernels", "lacking" if lacking else "ok", ", ".join(there) or "none", meaning)]


def _cpu_energy() -> list[Finding]:
    subject = "CPU energy (RAPL)"
    modelled = "CPU energy is modelled from load by CodeCarbon and marked so; RAM energy is always a constant"
    counters = sorted(RAPL.glob("intel-rapl:*/energy_uj")) if RAPL.is_dir() else []
    if not counters:
        return [Finding(subject, "lacking", f"no counter under {RAPL}", modelled)]
    if not os.access(counters[0], os.R_OK):
        found = f"no permission to read {counters[0]}"
        return [Finding(subject, "lacking", found, f"{modelled}; ask the administrator for read access")]
    measured = "CPU energy is measured; RAM energy is a constant"
    return [Finding(subject, "ok", f"{len(counters)} counters", measured)]


def _disk(folder: Path) -> list[Finding]:
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free_GiB = shutil.disk_usage(there).free / 2**30
    if free_GiB < 1:
        return [
            Finding(
                "disk",
                "blocking",
                f"{free_GiB:.2f} GiB free at {folder}",
                "records could be lost; free some space",
            )
        ]
    return [Finding("disk", "ok", f"{free_GiB:.0f} GiB free")]
