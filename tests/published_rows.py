"""Self-written rows of the study's two schemas, and the authors' own file where it lies."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from t2v_energy.work import paper, paper_work

J_PER_KWH = 3.6e6
SHARED = Path(__file__).resolve().parents[1] / "shared" / "data" / "published_h100"
CANDIDATES = [
    SHARED,
    *(p / "shared" / "data" / "published_h100" for p in Path(__file__).resolve().parents[2:]),
]
"""Beside the checkout or above it."""


def published_file() -> Path | None:
    """The authors' cross-model table, read in place; None where it is not."""
    found = (folder / "text2video_energy_benchmark.csv" for folder in CANDIDATES)
    return next((path for path in found if path.is_file()), None)


def row(
    model: str = "CogVideoX-2b",
    prompt: str = "a cat",
    *,
    duration_s: float = 50.0,
    gpu_W: float = 600.0,
    cpu_W: float = 60.0,
    ram_W: float = 30.0,
    size: tuple[int, int, int, int] = (480, 720, 49, 50),
    **others: object,
) -> dict[str, object]:
    """One row of the cross-model table; ``size`` is height, width, frames and steps."""
    energies = {"gpu": gpu_W, "cpu": cpu_W, "ram": ram_W}
    found: dict[str, object] = {
        "model_name": model,
        "duration_generate": duration_s,
        **{f"energy_generate_{part}": watts * duration_s / J_PER_KWH for part, watts in energies.items()},
        **dict(zip(("height", "width", "num_frames", "steps"), size, strict=True)),
        "prompt": prompt,
        "gpu_model": "NVIDIA H100 80GB HBM3",
        "runs": 1,
        "warmup": 2,
    }
    return found | others


def clean_rows() -> list[dict[str, object]]:
    """Two models, six prompts: powers that differ from row to row, nothing wrong."""
    rows = []
    models = (("CogVideoX-2b", 50.0, 600.0), ("CogVideoX-5b", 124.0, 630.0))
    for model, duration_s, gpu_W in models:
        for i in range(6):
            rows.append(
                row(model, f"prompt {i}", duration_s=duration_s * (1 + 0.002 * i),
                    gpu_W=gpu_W * (1 + 0.01 * (i % 3)), cpu_W=60 * (1 + 0.01 * (i % 2)), ram_W=20 + 2 * i)
            )  # fmt: skip
    return rows


def write(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """The rows as a CSV file; a column that a row lacks is empty there."""
    listed = list(rows)
    names = list(dict.fromkeys(name for each in listed for name in each))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(listed)
    return path


def sweep_rows(times: float = 1.05) -> list[dict[str, object]]:
    """The sweeps of Wan2.1, self-written: the study's printed formulas, ``times`` as slow, at 690 W."""
    swept = [("res", (h, w, 81, 50)) for h, w in ((256, 256), (480, 832), (720, 1280), (1008, 1792))]
    swept += [("frames", (720, 1280, frames, 50)) for frames in (4, 20, 40, 80, 100)]
    swept += [("steps", (720, 1280, 81, steps)) for steps in (1, 10, 50, 200)]
    return [
        row(
            "WAN2.1-T2V-1.3B", duration_s=times * paper.latency_s(paper_work(*size).total_flop), gpu_W=690,
            size=size, parameter=parameter,
        )
        for parameter, size in swept
    ]  # fmt: skip
