"""Experiment ``cross-model`` with planted costs: every model of the study, one twice, one that failed.

Costs are the printed ones times a factor, so that every ratio that a test expects is known; stages have the
shares of :data:`SHARES`.  No GPU, no real data.
"""

from __future__ import annotations

from math import nan
from pathlib import Path

import pandas as pd
import records as planted
import synthetic_campaign as synthetic
from t2v_energy.analysis.models import EXPERIMENT
from t2v_energy.config import ModelFile, load_model
from t2v_energy.measurement.record import Memory, Operators, Record
from t2v_energy.study import Study, load_study

STUDY: Study = load_study(synthetic.REPOSITORY)
FACTOR = 0.8
"""Our latency and GPU energy over the printed ones."""
FAILED = "mochi-1-preview"
"""The model that ran out of memory."""
SHARES = {"denoiser": 0.7, "vae_decode": 0.15, "text_encoder": 0.02, "scheduler": 0.01, "postprocess": 0.02}
LTX_SHARES = SHARES | {"denoiser": 0.4, "refine": 0.3, "upsample": 0.05}
LIGHT = "animatediff-lightning"
"""The model whose GPU share is too small: its CPU energy is half of the total."""
POWER_W, IDLE_W = 620.0, 120.0
MEMORY_GIB = {"text_encoder": 12.0, "denoiser": 20.0, "vae_decode": 30.0}
RESERVED_OVER_ALLOCATED = 1.25


def model(key: str) -> ModelFile:
    return load_model(synthetic.REPOSITORY, key)


def shares(key: str) -> dict[str, float]:
    return LTX_SHARES if key.startswith("ltx") else SHARES


def row(key: str, *, protocol: str = "sampled", n: int = 6, times: float = 1.0) -> dict[str, object]:
    """One row of configurations.csv of a model at its defaults: printed costs × FACTOR × ``times``."""
    defaults, printed = model(key).defaults, STUDY.models[key]
    kept = synthetic.row(EXPERIMENT, (720, 1280), protocol=protocol, uuids=("GPU-A",), n=n)
    size = f"{defaults.height}x{defaults.width}_{defaults.num_frames}f_{defaults.num_inference_steps}s"
    found = kept | {
        "model": key, "height": defaults.height, "width": defaults.width, "num_frames": defaults.num_frames,
        "num_inference_steps": defaults.num_inference_steps, "configuration_id": f"{key}_{size}",
    }  # fmt: skip
    for name in ("latency_s", "gpu_energy_Wh", "cpu_energy_Wh", "ram_energy_Wh"):
        value = FACTOR * times * getattr(printed, name)[0]
        if key == LIGHT and name == "cpu_energy_Wh":
            value = found["gpu_energy_Wh"]  # as much as the GPU's
        std, ci95 = (value / 200, value / 100) if n > 1 else (nan, nan)
        found |= {name: value, f"{name}_std": std, f"{name}_ci95": ci95, f"{name}_n": n}
    latency = found["latency_s"]
    for ending in ("time", "energy"):
        found |= {f"{stage}_{ending}_share": nan for stage in ("upsample", "refine")}
        found |= {f"{stage}_{ending}_share": share for stage, share in shares(key).items()}
    return found | {
        "step_time_s": latency * shares(key)["denoiser"] / defaults.num_inference_steps,
        "mean_power_W": POWER_W, "idle_power_W": IDLE_W, "mfu": 0.3 if key.startswith("wan") else nan,
    }  # fmt: skip


def rows() -> pd.DataFrame:
    """The study's models; Wan-1.3B also as one whole generation without an interval; Mochi failed."""
    found = [row(key) for key in STUDY.models if key != FAILED]
    found.append(row("wan2.1-t2v-1.3b", protocol="full", n=1, times=1.5))
    prompted = row("cogvideox-2b", times=2.0)
    prompted["configuration_id"] = f"{prompted['configuration_id']}_pp001"
    kept = ("experiment", "model", "height", "width", "num_frames", "num_inference_steps", "protocol",
            "attention_kernel", "intervention", "configuration_id")  # fmt: skip
    failed = {name: value for name, value in row(FAILED).items() if name in kept}
    return pd.DataFrame([*found, prompted, failed | {"status": "out_of_memory"}])


def record(key: str, *, reasons: int = 0x4, gpu: str | None = planted.GPU) -> Record:
    """A record behind a model's row: memory of :data:`MEMORY_GIB`, and these throttle reasons."""
    defaults = model(key).defaults.model_dump(exclude={"fps"})
    config = planted.configuration(model=key, **defaults)
    sizes = {stage: int(size * 2**30) for stage, size in MEMORY_GIB.items()}
    return planted.make_record(
        experiment=EXPERIMENT,
        config=config,
        reasons=reasons,
        gpu=gpu,
        operators=Operators(
            steps=1, stage=["denoiser"], operator=["aten::linear"], device_s=[0.4], kernels=[100]
        ),
        memory=Memory(
            allocated_B=sizes,
            reserved_B={stage: int(size * RESERVED_OVER_ALLOCATED) for stage, size in sizes.items()},
        ),
    )


def root(folder: Path, table: pd.DataFrame | None = None) -> Path:
    """A repository's root whose only experiment is ``cross-model``, with its table and its records."""
    base = synthetic.root(folder, rows() if table is None else table)
    write_records(base)
    return base


def write_records(base: Path) -> None:
    """A record of each measured model, in the campaign's raw folder."""
    for key in STUDY.models:
        if key != FAILED:
            planted.write(record(key), base / "results" / "raw" / "h200" / EXPERIMENT)


def total_Wh(key: str) -> float:
    """GPU, CPU and RAM energy (Wh) of a planted row together."""
    found = row(key)
    return sum(float(found[f"{name}_energy_Wh"]) for name in ("gpu", "cpu", "ram"))
