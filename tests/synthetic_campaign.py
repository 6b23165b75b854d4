"""A campaign with planted costs, for tests of analysis and paper: no GPU, no real data, no randomness."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
from t2v_energy.analysis import facts, numbers, style, sweep_figure, tables
from t2v_energy.analysis.resolution_numbers import resolution_numbers
from t2v_energy.analysis.sweep import read_sweep
from t2v_energy.config import load_model
from t2v_energy.work import true_work

REPOSITORY = Path(__file__).resolve().parents[1]
PEAK = 989e12
MU = 0.5
POWER_W = 650.0
SLOWER = 1.04
"""Times the latency and energy of board A against board C; board B is C's like.  Power is the same on all."""
BOARDS = (("GPU-A", "GPU-C"), ("GPU-A", "GPU-C"), ("GPU-A", "GPU-C"), ("GPU-A", "GPU-C"), ("GPU-B", "GPU-C"))
"""Boards of the two passes, by size."""
SIZES = ((256, 256), (384, 384), (480, 832), (720, 1280), (1008, 1792))


def configurations(mu: float = MU) -> pd.DataFrame:
    """Rows as stage 3 writes them, whose latency is true work at one efficiency ``mu``.

    Board C's own latencies are at ``mu`` · (1 + :data:`SLOWER`) / 2 where the other pass ran on board A.
    """
    model = load_model(REPOSITORY, "wan2.1-t2v-1.3b")
    rows = []
    for (height, width), uuids in zip(SIZES, BOARDS, strict=True):
        latency = true_work(model, height, width, 81, 50).total_flop / (mu * PEAK)
        energy = POWER_W * latency / 3600
        row: dict[str, object] = {
            "experiment": "resolution", "model": model.key, "height": height, "width": width,
            "num_frames": 81, "num_inference_steps": 50, "protocol": "sampled", "attention_kernel": "cudnn",
            "intervention": "", "status": "ok", "flags": "", "passes": 2,
            "gpus": 2, "gpu_uuids": ";".join(uuids),
            "configuration_id": f"{model.key}_{height}x{width}_81f_50s",
            "step_time_s": latency / 51, "step_time_sem_percent": 0.1, "step_energy_J": energy * 3600 / 51,
            "codecarbon_window_energy_Wh": 1.01, "counter_window_energy_Wh": 1.0,
            "mean_power_W": POWER_W, "mfu": mu, "unspanned_percent": 0.1,
        }  # fmt: skip
        for name, value in (
            ("latency_s", latency),
            ("gpu_energy_Wh", energy),
            ("cpu_energy_Wh", energy / 10),
        ):
            row |= {name: value, f"{name}_std": value / 200, f"{name}_ci95": value / 100, f"{name}_n": 3}
        times = SLOWER if "GPU-A" in uuids else 1.0
        for name, value in (("latency_s", latency), ("gpu_energy_Wh", energy)):
            means = (value * 2 * times / (1 + times), value * 2 / (1 + times))
            row[f"{name}_pass_means"] = ";".join(map(repr, means))
            row[f"{name}_pass_spread_percent"] = 100 * (max(means) - min(means)) / value
        row |= {"gpu_energy_Wh_kind": "measured", "cpu_energy_Wh_kind": "modelled"}
        for stage, share in (("denoiser", 0.95), ("vae_decode", 0.04), ("text_encoder", 0.01)):
            row |= {f"{stage}_time_share": share, f"{stage}_energy_share": share}
        rows.append(row)
    other = dict(rows[0], experiment="frames")
    failed = dict(rows[0], height=1984, width=3520, status="out_of_memory", latency_s=float("nan"))
    return pd.DataFrame([*rows, other, failed])


def record(
    gpu: bool = True,
    *,
    size: tuple[int, int] = SIZES[0],
    uuid: str = "GPU-A",
    pass_index: int = 1,
    step_s: tuple[float, ...] = (1.0, 1.0),
) -> dict[str, object]:
    """The parts of a raw record that its facts are read from: generations of two steps each.

    A step that takes longer than 1 s has its power (W) lowered as if the GPU waited: 600 W a second.
    """
    card = {
        "name": "NVIDIA H200",
        "uuid": uuid,
        "driver": "580.1",
        "power_limit_W": 700.0,
        "memory_total_MiB": 1,
    }
    windows: dict[str, list[object]] = {
        "kind": ["idle_before"],
        "steps": [0],
        "start_s": [1.0],
        "end_s": [4.0],
    }
    spans: dict[str, list[object]] = {
        name: [] for name in ("window", "stage", "step", "call", "start_s", "end_s")
    }
    samples: dict[str, list[object]] = {"time_s": [], "power_instant_W": [], "sm_clock_MHz": []}
    samples |= {"temperature_C": [], "throttle_reasons": []}
    now_s = 5.0
    for index, length_s in enumerate(step_s, 1):
        start_s = now_s
        for step in range(2):
            values = (index, "denoiser", step, 0, now_s, now_s + length_s)
            for column, value in zip(spans.values(), values, strict=True):
                column.append(value)
            capped = 0x4 if length_s == 1 else 0x0
            for column, value in zip(
                samples.values(),
                (now_s + length_s / 2, 600 / length_s, 1700 + 10 * pass_index, 60 + step, capped),
                strict=True,
            ):
                column.append(value)
            now_s += length_s
        for column, value in zip(windows.values(), ("generation", 2, start_s, now_s), strict=True):
            column.append(value)
    windows["end_s"][-1] = 61.0
    ticks = {"time_s": [1.0, 1.1, 1.2, 60.0], "energy_mJ": [0, 70_000, 140_000, 36_000_000]}
    return {
        "status": "ok", "configuration_id": f"c_{size[0]}x{size[1]}", "protocol": "sampled",
        "pass_index": pass_index, "configuration": {"height": size[0], "width": size[1]},
        "origin": {"utc": f"2025-11-21T0{pass_index}:00:00+00:00", "monotonic_s": 0.0},
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
        "windows": windows,
        "spans": spans,
        "samples": samples if gpu else None,
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
    write_records(folder / "results" / "raw" / "h200" / "resolution", *records())
    meter = folder / "results" / "tables" / "meter.csv"
    meter.parent.mkdir(parents=True)
    meter_errors().to_csv(meter, index=False)
    return folder


def meter_errors() -> pd.DataFrame:
    """The rows of meter.csv that the text reads."""
    methods, traces = ("change_point", "linear", "nearest_tick"), ("denoising", "rippled denoising")
    return pd.DataFrame(
        {
            "method": method, "window_s": 0.4, "trace": f"{trace}, 100 ms",
            "median_error_percent": 0.1, "p95_error_percent": 0.2, "coverage_90": 0.95, "n": 40,
        }
        for method in methods
        for trace in traces
    )  # fmt: skip


def records(gpu: bool = True) -> list[dict[str, object]]:
    """Two passes over :data:`SIZES`, on :data:`BOARDS`; the smallest size's second has a slow generation."""
    return [
        record(
            gpu,
            size=size,
            uuid=uuids[pass_index - 1],
            pass_index=pass_index,
            step_s=(1.5, 1.0, 1.0) if (size, pass_index) == (SIZES[0], 2) else (1.0, 1.0),
        )
        for pass_index in (1, 2)
        for size, uuids in zip(SIZES, BOARDS, strict=True)
    ]


def build(base: Path) -> dict[str, numbers.Number]:
    """What the notebook does: figure 2, table 3 and the numbers, merged."""
    sweep = read_sweep(base, "h200", Path("results/aggregated/h200/configurations.csv"))
    style.save(sweep_figure.figure_resolution(sweep), base / "figures" / "fig2")
    errors = tables.table3({"resolution": sweep})
    tables.write_table3(errors, base / "results/tables/h200/table3")
    read = facts.read_facts("results/raw/h200/resolution", base)
    found = resolution_numbers(sweep, errors, "results/tables/h200/table3.csv", read)
    part = base / "results/numbers/h200/resolution.json"
    numbers.write(part, found)
    numbers.merge([part], base / "results/numbers/h200.json")
    return found
