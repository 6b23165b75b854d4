"""A campaign with planted costs, for tests of analysis and paper: no GPU, no real data, no randomness."""

from __future__ import annotations

import json
import shutil
from math import nan
from pathlib import Path

import pandas as pd
from t2v_energy.analysis import facts, numbers, style, sweep_figure, tables
from t2v_energy.analysis.sweep import fit_predictors, read_sweeps
from t2v_energy.analysis.sweep_numbers import sweep_numbers
from t2v_energy.config import load_model
from t2v_energy.work import true_work

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGURATIONS = Path("results/aggregated/h200/configurations.csv")
PEAK = 989e12
MU = 0.5
POWER_W = 650.0
SLOWER = 1.04
"""Times the latency and energy of board A against board C; board B is C's like.  Power is the same on all."""
BOARDS = (("GPU-A", "GPU-C"), ("GPU-A", "GPU-C"), ("GPU-A", "GPU-C"), ("GPU-A", "GPU-C"), ("GPU-B", "GPU-C"))
"""Boards of the two passes, by size."""
SIZES = ((256, 256), (384, 384), (480, 832), (720, 1280), (1008, 1792))
"""Of experiment ``resolution``: 81 frames, 50 steps, two passes."""
FRAMES = (5, 21, 41, 61, 81, 101)
"""Of experiment ``frames``: 720×1280, 50 steps, two passes on boards A and C."""
STEPS = {(480, 832): {1: 3, 2: 3, 5: 2, 20: 1, 50: 1, 200: 1}, (720, 1280): {1: 2, 5: 2, 10: 1, 50: 1}}
"""Generations by size and steps of experiment ``steps``: protocol ``full``, one pass on board A."""
KERNEL_SIZES = ((256, 256), (480, 832), (720, 1280))
FLASH_SLOWER = 1.25
"""Times the latency and energy of flash against cudnn, experiment ``kernels``, one pass on board A."""
VALIDATION = {(256, 448): 5, (480, 832): 5, (720, 1280): 1}
"""Whole generations (``full``) by size of experiment ``validation``, one pass on board B."""
SAMPLED_OVER_FULL = 1.002
"""Times the latency and energy of ``sampled`` against ``full``, experiment ``validation``."""
IDLE_W = 120.0
CODECARBON_OVER_COUNTER = 1.01
STAGES = ("denoiser", "postprocess", "scheduler", "text_encoder", "vae_decode")
OTHER_EXPERIMENTS = ("frames", "steps", "kernels", "validation")


def configurations(mu: float = MU) -> pd.DataFrame:
    """Rows as stage 3 writes them, whose latency is true work at one efficiency ``mu``.

    Every experiment of the study's figures 2 to 4, ``kernels`` (flash takes :data:`FLASH_SLOWER` times as
    long) and ``validation`` (``sampled`` is :data:`SAMPLED_OVER_FULL` times ``full``), and one size that ran
    out of memory.
    """
    rows = [row("resolution", size, uuids=uuids, mu=mu) for size, uuids in zip(SIZES, BOARDS, strict=True)]
    rows += [row("frames", (720, 1280), frames, mu=mu) for frames in FRAMES]
    for size, steps in STEPS.items():
        rows += [
            row("steps", size, 81, s, protocol="full", uuids=("GPU-A",), n=n, mu=mu) for s, n in steps.items()
        ]
    for size in KERNEL_SIZES:
        rows.append(row("kernels", size, uuids=("GPU-A",), mu=mu))
        rows.append(row("kernels", size, kernel="flash", uuids=("GPU-A",), times=FLASH_SLOWER, mu=mu))
    for size, n in VALIDATION.items():
        rows.append(row("validation", size, uuids=("GPU-B",), times=SAMPLED_OVER_FULL, mu=mu))
        rows.append(row("validation", size, protocol="full", uuids=("GPU-B",), n=n, mu=mu))
    return pd.DataFrame([*rows, out_of_memory((1984, 3520))])


def row(
    experiment: str,
    size: tuple[int, int],
    frames: int = 81,
    steps: int = 50,
    *,
    protocol: str = "sampled",
    kernel: str = "cudnn",
    intervention: str = "",
    uuids: tuple[str, ...] = ("GPU-A", "GPU-C"),
    n: int = 6,
    times: float = 1.0,
    mu: float = MU,
) -> dict[str, object]:
    """One row of configurations.csv, every column: true work at ``mu``, ``times`` as long, :data:`POWER_W`.

    One pass for each of ``uuids``, ``n`` generations in all; ``n`` = 1 has no scatter (NaN).  Board C's own
    latencies are below the mean, and board A's above, where both ran (:data:`SLOWER`).
    """
    model = load_model(REPOSITORY, "wan2.1-t2v-1.3b")
    height, width = size
    stages_s = {
        stage: times * flop / (mu * PEAK)
        for stage, flop in true_work(model, height, width, frames, steps).flop_by_stage.items()
    }
    latency = sum(stages_s.values())
    energy = POWER_W * latency / 3600
    identity = f"{model.key}_{height}x{width}_{frames}f_{steps}s"
    identity += f"__{kernel}" if kernel != "cudnn" else ""
    identity += f"__{intervention}" if intervention else ""
    found: dict[str, object] = {
        "experiment": experiment, "model": model.key, "height": height, "width": width,
        "num_frames": frames, "num_inference_steps": steps, "protocol": protocol,
        "attention_kernel": kernel, "intervention": intervention, "status": "ok",
    }  # fmt: skip
    costs = {"latency_s": latency, "gpu_energy_Wh": energy}
    others = {"cpu_energy_Wh": energy / 10, "ram_energy_Wh": energy / 20}
    kinds = {"gpu_energy_Wh": "measured", "cpu_energy_Wh": "modelled", "ram_energy_Wh": "constant"}
    for name, value in (costs | others).items():
        std, ci95 = (value / 200, value / 100) if n > 1 else (nan, nan)
        found |= {name: value, f"{name}_std": std, f"{name}_ci95": ci95, f"{name}_n": n}
        if name in kinds:
            found[f"{name}_kind"] = kinds[name]
    shares = {stage: stages_s.get(stage, 0.0) / latency for stage in STAGES}
    for ending in ("time", "energy"):
        found |= {f"{stage}_{ending}_share": share for stage, share in shares.items()}
    window_s = 20.0 + latency / 10
    found |= {
        "step_time_s": stages_s["denoiser"] / steps, "step_time_sem_percent": 0.1 if n > 1 else nan,
        "step_energy_J": POWER_W * stages_s["denoiser"] / steps, "once_s": latency - stages_s["denoiser"],
        "mean_power_W": POWER_W, "idle_power_W": IDLE_W, "unspanned_percent": 0.1, "mfu": mu / times,
        "memory_allocated_GiB": 30.0, "memory_reserved_GiB": 40.0,
        "codecarbon_window_energy_Wh": CODECARBON_OVER_COUNTER * POWER_W * window_s / 3600,
        "codecarbon_duration_s": window_s + 0.03,
        "counter_window_energy_Wh": POWER_W * window_s / 3600, "counter_window_s": window_s,
        "gpus": len(set(uuids)), "gpu_uuids": ";".join(uuids),
    }  # fmt: skip
    slow = SLOWER if len(uuids) == 2 and "GPU-A" in uuids else 1.0
    for name, value in costs.items():
        means = [value * 2 * slow / (1 + slow), value * 2 / (1 + slow)] if len(uuids) == 2 else [value]
        found[f"{name}_pass_means"] = ";".join(map(repr, means))
        spread = 100 * (max(means) - min(means)) / value
        found[f"{name}_pass_spread_percent"] = spread if len(means) > 1 else nan
    return found | {"flags": "", "configuration_id": identity, "passes": len(uuids)}


def out_of_memory(size: tuple[int, int]) -> dict[str, object]:
    """A row of experiment ``resolution`` that did not fit: it has no quantities."""
    known = ("experiment", "model", "height", "width", "num_frames", "num_inference_steps", "protocol")
    kept = (*known, "attention_kernel", "intervention", "flags", "configuration_id", "passes", "gpus")
    whole = row("resolution", size, uuids=("GPU-A",))
    return {name: value if name in kept else nan for name, value in whole.items()} | {
        "status": "out_of_memory", "gpu_uuids": "GPU-A", "latency_s_n": 0, "gpu_energy_Wh_n": 0,
    }  # fmt: skip


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
    for experiment in OTHER_EXPERIMENTS:
        write_records(folder / "results" / "raw" / "h200" / experiment, record(size=(720, 1280)))
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
    """What the notebook of the sweeps does: figures 2 to 4, table 3 and the numbers, merged."""
    sweeps = read_sweeps(base, "h200", CONFIGURATIONS)
    predictors = fit_predictors(sweeps.values())
    for name, sweep in sweeps.items():
        figure = sweep_figure.figure_sweep(sweep, predictors)
        style.save(figure, base / "figures" / sweep_figure.FIGURES[name])
    return sweep_results(base)


def sweep_results(base: Path) -> dict[str, numbers.Number]:
    """:func:`build` without its figures, which take the most time."""
    sweeps = read_sweeps(base, "h200", CONFIGURATIONS)
    predictors = fit_predictors(sweeps.values())
    errors = tables.table3(sweeps, predictors)
    tables.write_table3(errors, base / "results/tables/h200/table3")
    read = facts.read_facts(f"results/raw/h200/{next(iter(sweeps))}", base)
    found = sweep_numbers(sweeps, predictors, errors, "results/tables/h200/table3.csv", read)
    part = base / "results/numbers/h200/sweeps.json"
    numbers.write(part, found)
    numbers.merge([part], base / "results/numbers/h200.json")
    return found
