"""A campaign with planted costs, for tests of analysis and paper: no GPU, no real data, no randomness."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
from t2v_energy.analysis import facts, numbers, resolution, style, tables
from t2v_energy.analysis.resolution_numbers import resolution_numbers
from t2v_energy.config import load_model
from t2v_energy.work import true_work

REPOSITORY = Path(__file__).resolve().parents[1]
PEAK = 989e12
MU = 0.5
POWER_W = 650.0
SIZES = ((256, 256), (384, 384), (480, 832), (720, 1280), (1008, 1792))


def configurations(mu: float = MU) -> pd.DataFrame:
    """Rows as stage 3 writes them, whose latency is true work at one efficiency ``mu``."""
    model = load_model(REPOSITORY, "wan2.1-t2v-1.3b")
    rows = []
    for height, width in SIZES:
        latency = true_work(model, height, width, 81, 50).total_flop / (mu * PEAK)
        energy = POWER_W * latency / 3600
        row: dict[str, object] = {
            "experiment": "resolution", "model": model.key, "height": height, "width": width,
            "num_frames": 81, "num_inference_steps": 50, "protocol": "sampled", "attention_kernel": "cudnn",
            "intervention": "", "status": "ok", "flags": "", "passes": 1,
            "configuration_id": f"{model.key}_{height}x{width}_81f_50s",
            "step_time_s": latency / 51, "step_time_sem_percent": 0.1, "step_energy_J": energy * 3600 / 51,
            "codecarbon_gpu_energy_Wh": 1.01, "counter_window_energy_Wh": 1.0,
            "mean_power_W": POWER_W, "mfu": mu, "unspanned_percent": 0.1,
        }  # fmt: skip
        for name, value in (
            ("latency_s", latency),
            ("gpu_energy_Wh", energy),
            ("cpu_energy_Wh", energy / 10),
        ):
            row |= {name: value, f"{name}_std": value / 200, f"{name}_ci95": value / 100, f"{name}_n": 3}
        row |= {"gpu_energy_Wh_kind": "measured", "cpu_energy_Wh_kind": "modelled"}
        for stage, share in (("denoiser", 0.95), ("vae_decode", 0.04), ("text_encoder", 0.01)):
            row |= {f"{stage}_time_share": share, f"{stage}_energy_share": share}
        rows.append(row)
    other = dict(rows[0], experiment="frames")
    failed = dict(rows[0], height=1984, width=3520, status="out_of_memory", latency_s=float("nan"))
    return pd.DataFrame([*rows, other, failed])


def record(gpu: bool = True) -> dict[str, object]:
    """The parts of a raw record that its facts are read from."""
    card = {
        "name": "NVIDIA H200",
        "uuid": "GPU-0",
        "driver": "580.1",
        "power_limit_W": 700.0,
        "memory_total_MiB": 1,
    }
    ticks = {"time_s": [1.0, 1.1, 1.2, 60.0], "energy_mJ": [0, 70_000, 140_000, 36_000_000]}
    return {
        "environment": {
            "gpu": card if gpu else None, "cpu": "A CPU", "weights": "random, seed 1",
            "versions": {"torch": "2.11.0", "diffusers": "0.42.1", "codecarbon": "3.3.2"},
        },
        "codecarbon": {"cpu_method": "cpu_load"},
        "attention_kernels": {"denoiser": ["cudnn"]},
        "protocol_settings": {
            "idle_s": 2.0, "sample_hz": 20.0, "poll_s": 0.002, "full": {"warmups": 2, "repetitions": 5},
            "sampled": {
                "warmup_steps": 1, "min_steps": 2, "min_window_s": 4.0, "generations": 3,
                "max_generations": 8, "max_step_sem_percent": 0.3, "max_ci95_percent": 1.0,
            },
        },
        "windows": {"start_s": [1.0, 5.0], "end_s": [4.0, 61.0]},
        "ticks": ticks if gpu else None,
        "flags": [],
    }  # fmt: skip


def write_records(folder: Path, *records: dict[str, object]) -> None:
    """Write ``records`` as files of an experiment's folder."""
    folder.mkdir(parents=True)
    for index, data in enumerate(records):
        (folder / f"c{index}__sampled_r1.json").write_text(json.dumps(data), encoding="utf-8")


def root(folder: Path, table: pd.DataFrame) -> Path:
    """A repository's root with ``config/``, ``paper/`` and the campaign's table and records."""
    for name in ("config", "paper"):
        shutil.copytree(REPOSITORY / name, folder / name)
    (folder / "Snakefile").touch()
    path = folder / "results" / "aggregated" / "h200" / "configurations.csv"
    path.parent.mkdir(parents=True)
    table.to_csv(path, index=False)
    write_records(folder / "results" / "raw" / "h200" / "resolution", record(), record())
    return folder


def build(base: Path) -> dict[str, numbers.Number]:
    """What the notebook does: figure 2, table 3 and the numbers, merged."""
    sweep = resolution.read_sweep(base, "h200", Path("results/aggregated/h200/configurations.csv"))
    style.save(resolution.figure_resolution(sweep), base / "figures" / "fig2")
    errors = tables.table3({"resolution": sweep})
    tables.write_table3(errors, base / "results/tables/h200/table3")
    read = facts.read_facts("results/raw/h200/resolution", base)
    found = resolution_numbers(sweep, errors, "results/tables/h200/table3.csv", read)
    part = base / "results/numbers/h200/resolution.json"
    numbers.write(part, found)
    numbers.merge([part], base / "results/numbers/h200.json")
    return found
