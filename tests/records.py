"""Records made from a known power trace, so that every energy a test expects follows from arithmetic.

All durations are multiples of the counter's 100 ms tick, so the ticks hold each stage's energy exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from t2v_energy.config import Configuration, ProtocolSettings
from t2v_energy.measurement.record import (
    CodeCarbonReading,
    Environment,
    Gpu,
    Memory,
    Origin,
    Record,
    Spans,
    Windows,
    to_json,
)
from t2v_energy.metering.series import Samples, Ticks

GPU = "NVIDIA H200"
TICK_S = 0.1
SAMPLE_S = 0.05

IDLE_S, IDLE_W = 2.0, 100.0
TEXT_S, TEXT_W = 0.4, 300.0  # two calls
LOOP_W = 500.0
VAE_S, VAE_W = 0.6, 400.0
POST_S, POST_W = 0.1, 100.0
PAUSE_S = 0.1  # between generations, at idle power
MARGIN_S = 0.5  # the meter runs before the first window and after the last one
ONCE_S = TEXT_S + VAE_S + POST_S
ONCE_J = TEXT_S * TEXT_W + VAE_S * VAE_W + POST_S * POST_W
CPU_W, RAM_W = 60.0, 20.0


@dataclass
class Timeline:
    """Windows and spans as they are laid one after the other, with the power (W) of each stretch."""

    now_s: float = 0.0
    windows: dict[str, list[Any]] = field(
        default_factory=lambda: {"kind": [], "steps": [], "start_s": [], "end_s": []}
    )
    spans: dict[str, list[Any]] = field(
        default_factory=lambda: {k: [] for k in ("window", "stage", "step", "call", "start_s", "end_s")}
    )
    edges_s: list[float] = field(default_factory=lambda: [0.0])
    power_W: list[float] = field(default_factory=list)

    def pass_time(self, duration_s: float, power_W: float) -> None:
        self.now_s = round(self.now_s + duration_s, 6)
        self.edges_s.append(self.now_s)
        self.power_W.append(power_W)

    def span(self, stage: str, step: int, call: int, duration_s: float, power_W: float) -> None:
        row = (len(self.windows["kind"]) - 1, stage, step, call, self.now_s)
        self.pass_time(duration_s, power_W)
        for column, value in zip(self.spans.values(), (*row, self.now_s), strict=True):
            column.append(value)

    def window(self, kind: str, steps: int = 0) -> None:
        for column, value in zip(self.windows.values(), (kind, steps, self.now_s, self.now_s), strict=True):
            column.append(value)

    def close(self) -> None:
        self.windows["end_s"][-1] = self.now_s

    def idle(self, kind: str) -> None:
        self.window(kind)
        self.pass_time(IDLE_S, IDLE_W)
        self.close()

    def generation(
        self, kind: str, steps: int, step_s: float | Sequence[float], unspanned_s: float = 0.0
    ) -> None:
        """Two text encoder calls, ``steps`` × (two denoiser calls, scheduler), VAE, post-processing.

        ``step_s`` is the length of each step, or of all.
        """
        lengths_s = step_s if isinstance(step_s, Sequence) else [step_s] * steps
        self.window(kind, steps)
        for call in range(2):
            self.span("text_encoder", -1, call, TEXT_S / 2, TEXT_W)
        for step, length_s in enumerate(lengths_s[:steps]):
            for call in range(2):
                self.span("denoiser", step, call, 0.4 * length_s, LOOP_W)
            self.span("scheduler", step, 0, 0.2 * length_s, LOOP_W)
        self.span("vae_decode", -1, 0, VAE_S, VAE_W)
        self.span("postprocess", -1, 0, POST_S, POST_W)
        if unspanned_s:
            self.pass_time(unspanned_s, IDLE_W)
        self.close()

    def energy_J(self, time_s: Any) -> Any:
        """Energy from the beginning to ``time_s``: the truth."""
        cumulative = np.concatenate(([0.0], np.cumsum(np.diff(self.edges_s) * self.power_W)))
        return np.interp(time_s, self.edges_s, cumulative)

    def ticks(self) -> Ticks:
        count = round(self.now_s / TICK_S) + 1
        times = np.round(np.arange(count) * TICK_S, 5)
        return Ticks(
            time_s=times.tolist(),
            not_before_s=np.round(times - 2e-5, 5).tolist(),
            energy_mJ=np.round(1e6 + 1000 * self.energy_J(times)).astype(int).tolist(),
        )

    def samples(self, power_scale: float, reasons: int) -> Samples:
        times = np.arange(0, self.now_s, SAMPLE_S)
        index = np.searchsorted(self.edges_s, times, side="right") - 1
        power = power_scale * np.asarray(self.power_W)[np.minimum(index, len(self.power_W) - 1)]
        same = {
            "sm_clock_MHz": 1980,
            "temperature_C": 55,
            "throttle_reasons": reasons,
            "memory_used_MiB": 9e3,
        }
        return Samples(
            time_s=times.tolist(),
            power_instant_W=power.tolist(),
            power_average_W=(0.5 * power).tolist(),  # wrong on purpose: nothing may use it
            **{name: [value] * len(times) for name, value in same.items()},
        )


def environment(gpu: str | None = GPU, **changes: Any) -> Environment:
    """An environment with one GPU, or with none."""
    values: dict[str, Any] = {
        "host": "test",
        "platform": "Linux",
        "python": "3.11.7",
        "cpu": "a CPU",
        "cpu_count": 2,
        "memory_GiB": 8.0,
        "gpu": None,
        "versions": {"torch": "2.11.0"},
        "git_commit": "unknown",
        "weights": "random, seed 0",
    }
    if gpu is not None:
        values["gpu"] = Gpu(
            name=gpu, uuid="GPU-0", driver="580", power_limit_W=700.0, memory_total_MiB=143771.0
        )
    return Environment(**(values | changes))


def configuration(**changes: Any) -> Configuration:
    """Wan2.1-1.3B at 480×832, 81 frames, 50 steps."""
    values: dict[str, Any] = {
        "model": "wan2.1-t2v-1.3b",
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
    }
    return Configuration(**(values | changes))


def make_record(
    *,
    steps: int = 4,
    step_s: Sequence[float | Sequence[float]] = (0.5, 0.5, 0.5),
    gpu: str | None = GPU,
    unspanned_s: float = 0.0,
    power_scale: float = 1.0,
    reasons: int = 0x4,
    config: Configuration | None = None,
    **changes: Any,
) -> Record:
    """A record of ``len(step_s)`` generations of ``steps`` steps, each ``step_s`` long (multiples of 0.5 s).

    A generation's ``step_s`` may give each of its steps another length.

    ``unspanned_s`` is time without a span at each generation's end; ``power_scale`` falsifies the power
    samples against the counter; ``reasons`` is NVML's bit mask throughout.
    """
    line = Timeline()
    line.pass_time(MARGIN_S, IDLE_W)
    line.idle("idle_before")
    line.generation("warmup", 1, step_s[0])
    for length_s in step_s:
        line.pass_time(PAUSE_S, IDLE_W)
        line.generation("generation", steps, length_s, unspanned_s)
    line.idle("idle_after")
    line.pass_time(MARGIN_S, IDLE_W)
    first_s = line.windows["start_s"][1]  # CodeCarbon's window holds the warm-up, too
    last_s = line.windows["end_s"][1 + len(step_s)]
    duration_s = last_s - first_s
    config = config or configuration()
    values: dict[str, Any] = {
        "campaign": "h200",
        "experiment": "resolution",
        "configuration_id": config.id(),
        "configuration": config,
        "protocol": "sampled",
        "protocol_settings": ProtocolSettings(),
        "pass_index": 1,
        "order": 0,
        "status": "ok",
        "origin": Origin(utc="2025-11-21T00:00:00Z", monotonic_s=1000.0),
        "environment": environment(gpu),
        "attention_kernels": {"denoiser": ["cudnn"], "vae_decode": ["math"]},
        "windows": Windows(**line.windows),
        "spans": Spans(**line.spans),
        "ticks": line.ticks() if gpu else None,
        "samples": line.samples(power_scale, reasons) if gpu else None,
        "codecarbon": CodeCarbonReading(
            version="3.3.2",
            duration_s=duration_s,
            gpu_energy_Wh=float(line.energy_J(last_s) - line.energy_J(first_s)) / 3600 if gpu else 0.0,
            cpu_energy_Wh=CPU_W * duration_s / 3600,
            ram_energy_Wh=RAM_W * duration_s / 3600,
            gpu_method="nvml_energy_counter" if gpu else "none",
            cpu_method="cpu_load",
            ram_method="constant_per_module",
        ),
        "memory": Memory(
            allocated_B={"denoiser": 8 * 2**30, "vae_decode": 16 * 2**30},
            reserved_B={"vae_decode": 20 * 2**30},
        ),
    }
    return Record(**(values | changes))


def out_of_memory(**changes: Any) -> Record:
    """A record of a configuration that did not fit."""
    empty = {"windows": Windows(), "spans": Spans(), "ticks": None, "samples": None, "codecarbon": None}
    missing = {"attention_kernels": {}, "memory": Memory(), "error": "CUDA out of memory"}
    return make_record(status="out_of_memory", **(empty | missing | changes))


def write(record: Record, folder: Path) -> Path:
    """Write a record under its own name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / record.file_name
    path.write_text(to_json(record), encoding="utf-8")
    return path
