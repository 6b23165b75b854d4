"""Rows of interventions.csv with planted ratios, for tests of figures, numbers and paper."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from t2v_energy.analysis import interventions


def merging_row(**changes: Any) -> dict[str, Any]:
    """A row of interventions.csv that merges tokens."""
    settings = {"kind": "token-merging", "method": "3d", "mode": "hidden", "ratio": 0.5, "stride": [2, 3, 3],
                "every": 1, "last_block": None, "match_every": 1, "metric": "hidden"}  # fmt: skip
    ratio = changes.pop("latency_ratio", 0.8)
    settings |= {name: changes.pop(name) for name in [*changes] if name in settings}
    row: dict[str, Any] = dict.fromkeys(interventions.COLUMNS, np.nan)
    row |= {
        "experiment": "token-merging", "model": "cogvideox-2b", "height": 480, "width": 720, "num_frames": 45,
        "num_inference_steps": 50, "baseline_steps": 50, "intervention": "tome", "lossless": "no",
        "measured_latency_ratio": ratio, "measured_latency_ratio_ci95": 0.01, "measured_energy_ratio": ratio,
        "measured_energy_ratio_ci95": 0.01, "predicted_energy_ratio": ratio * 1.02,
        "predicted_latency_ratio": ratio * 1.02, "predicted_energy_ratio_low": ratio,
        "predicted_energy_ratio_high": ratio * 1.04, "predicted_latency_ratio_low": ratio,
        "predicted_latency_ratio_high": ratio * 1.04, "energy_error_percent": 2.0,
        "latency_error_percent": 2.0, "predicted": "registered", "uncited_parts": 1,
        "settings": json.dumps({"tome": settings}), "configuration_id": "c", "protocol": "sampled",
        "videos_per_hour": 100 / ratio,
    }  # fmt: skip
    return row | changes


def grid() -> pd.DataFrame:
    """Two methods, two ratios, three strides, two choices of blocks; attnbin takes 5 % longer."""
    settings = [
        {"method": method, "ratio": ratio, "stride": stride, **blocks}
        for method in ("3d", "attnbin")
        for ratio in (0.3, 0.5)
        for stride in ([1, 3, 3], [2, 3, 3], [4, 6, 9])
        for blocks in ({"every": 2}, {"last_block": 27})
    ]
    return pd.DataFrame(
        merging_row(
            latency_ratio=(1 - 0.4 * own["ratio"]) * (1.05 if own["method"] == "attnbin" else 1.0),
            configuration_id=f"c{index}", **own,
        )
        for index, own in enumerate(settings)
    )  # fmt: skip


def measured(merging: pd.DataFrame, boards: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Rows of configurations.csv that ``merging`` may be of: one pass of two generations each, 0.2 % apart.

    ``boards``: of configurations, by id; else all ran on one.
    """
    latency_s = 10 * merging["measured_latency_ratio"]
    uuids = [(boards or {}).get(name, "GPU-0") for name in merging["configuration_id"]]
    kept = merging[["experiment", "configuration_id", "model", "height", "width", "num_frames"]]
    return kept.assign(
        status="ok", passes=1, latency_s=latency_s, latency_s_pass_means=latency_s, latency_s_n=2,
        latency_s_std=0.002 * latency_s, latency_s_ci95=0.02 * latency_s, gpu_energy_Wh=np.nan,
        gpu_energy_Wh_n=0, gpu_energy_Wh_std=np.nan, gpu_uuids=uuids,
        records=[f"h200/{name}__sampled_r1.json" for name in merging["configuration_id"]],
    )  # fmt: skip


def changes() -> pd.DataFrame:
    """Forty-eight rows: sixteen interventions at three sizes, one of them a long stack."""
    names = [f"intervention-{index}" for index in range(14)]
    names += ["attention-flash", "compile+magcache-0.12-k2+vae-bfloat16+fp8-rowwise"]
    sizes = [("wan2.1-t2v-1.3b", 720, 1280), ("wan2.1-t2v-1.3b", 480, 832), ("wan2.1-t2v-14b", 720, 1280)]
    found = []
    for number, (model, height, width) in enumerate(sizes):
        for index, name in enumerate(names):
            kinds = {
                part: {"kind": part.split("-")[0]} for part in name.split("+") if part != "attention-flash"
            }
            ratio = 1.4 if name == "attention-flash" else 0.95 - 0.04 * index - 0.02 * number
            row = merging_row(latency_ratio=ratio)
            found.append(
                row
                | {"experiment": "interventions", "model": model, "height": height, "width": width,
                   "num_frames": 81, "intervention": name, "uncited_parts": 0,
                   "settings": json.dumps(kinds) if kinds else "",
                   "configuration_id": f"{model}-{name}", "cited_quality": "PSNR 23 dB", "source": "a test",
                   "energy_error_percent": 0.1 * index * (-1) ** index, "compile_energy_Wh": 5.0,
                   "compile_s": 60.0, "break_even_videos": 0.4}
            )  # fmt: skip
    return pd.DataFrame(found)
