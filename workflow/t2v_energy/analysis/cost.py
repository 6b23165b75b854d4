"""What measuring cost: time and energy of the records, beside the study's protocol for the same points.

Ours is counted from the records: every pass, warm-ups and idle stretches with it.  Theirs is predicted from
what a video of each configuration takes here: two warm-up videos and five measured ones (section 4.1), once a
configuration, without idle stretches.  Energies are of the GPU's board alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isfinite, nan, sqrt

import numpy as np
import pandas as pd

from t2v_energy.analysis.instruments import Record
from t2v_energy.analysis.tables import booktabs
from t2v_energy.grids import Grid

WARMUPS, REPETITIONS = 2, 5
"""Videos that the study's protocol generates for each configuration (section 4.1)."""
FIGURES = ("resolution", "frames", "steps")
"""Experiments behind the study's figures 2, 3 and 4."""
LARGEST_PUBLISHED = 1008 * 1792
"""Pixels of the largest size that the study's published sweep has; it claims sizes up to 3520×1980."""
NEW_PROCESS_S = 5.0
"""A longer pause than this between two records of one board is another process: within one it is < 2 s."""
J_PER_WH = 3600.0

PARTS = ("idle", "warmup", "measured")
COST_COLUMNS = (
    "set", "configurations", "records", "out_of_memory", "gpu_s", "idle_s", "warmup_s", "measured_s",
    "between_s", "processes", "start_up_s", "gpu_energy_Wh", "idle_energy_Wh", "warmup_energy_Wh",
    "measured_energy_Wh", "kind", "gpu_s_one_pass", "protocol_configurations", "protocol_gpu_s",
    "protocol_gpu_s_ci95", "protocol_gpu_energy_Wh", "protocol_kind", "ratio_gpu_s", "ratio_gpu_energy",
    "ratio_gpu_s_one_pass", "ratio_gpu_s_with_start_up",
)  # fmt: skip
CARBON_COLUMNS = ("set", "grid", "year", "scope", "gco2e_per_kWh", "gco2e", "protocol_gco2e", "kind")


# --- one row a record ---------------------------------------------------------------------------------------


def record_costs(records: Mapping[str, list[Record]]) -> pd.DataFrame:
    """What each record took: one row a record, of any status.

    Columns: ``experiment``, ``configuration_id``, ``protocol``, ``pass_index``, ``status``, ``pixels``;
    ``gpu_s`` from the first window's start to the last one's end; ``idle_s``, ``warmup_s``, ``measured_s``
    of it (pauses between windows are in none); the same in joules (``gpu_J``, …; NaN without a counter);
    ``pause_s`` since the board's previous record (NaN for its first) and ``new_process``.
    """
    rows = [_cost(experiment, r) for experiment, group in records.items() for r in group]
    columns = [
        "experiment", "configuration_id", "protocol", "pass_index", "status", "pixels", "board", "began_s",
        "ended_s", "gpu_s", "idle_s", "warmup_s", "measured_s", "gpu_J", "idle_J", "warmup_J", "measured_J",
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=columns)
    table = table.sort_values(["board", "began_s", "configuration_id"], kind="stable").reset_index(drop=True)
    table["pause_s"] = table["began_s"] - table.groupby("board")["ended_s"].shift()
    table["new_process"] = ~table["pause_s"].between(0, NEW_PROCESS_S)
    return table


def _cost(experiment: str, record: Record) -> dict[str, object]:
    windows, gpu = record["windows"], record["environment"]["gpu"]
    part = np.array([_part(kind) for kind in windows["kind"]], dtype=object)
    start, end = np.asarray(windows["start_s"], dtype=float), np.asarray(windows["end_s"], dtype=float)
    began_s = datetime.fromisoformat(record["origin"]["utc"]).timestamp()
    total_s = float(end[-1] - start[0]) if len(end) else 0.0
    row: dict[str, object] = {
        "experiment": experiment,
        "configuration_id": record["configuration_id"],
        "protocol": record["protocol"],
        "pass_index": record["pass_index"],
        "status": record["status"],
        "pixels": record["configuration"]["height"] * record["configuration"]["width"],
        "board": gpu["uuid"] if gpu else "",
        "began_s": began_s,
        "ended_s": began_s + (float(end[-1]) if len(end) else 0.0),
        "gpu_s": total_s,
    }
    row |= {f"{name}_s": float((end - start)[part == name].sum()) for name in PARTS}
    if not record["ticks"] or not len(end):
        return row | dict.fromkeys(("gpu_J", *(f"{name}_J" for name in PARTS)), nan)
    # linear between ticks: over whole windows the edges hardly matter
    times, energy_mJ = record["ticks"]["time_s"], np.asarray(record["ticks"]["energy_mJ"], dtype=float)
    joules = (np.interp(end, times, energy_mJ) - np.interp(start, times, energy_mJ)) / 1000
    row["gpu_J"] = float(np.diff(np.interp([start[0], end[-1]], times, energy_mJ))[0]) / 1000
    return row | {f"{name}_J": float(joules[part == name].sum()) for name in PARTS}


def _part(kind: str) -> str:
    return {"warmup": "warmup", "generation": "measured"}.get(kind, "idle")


def start_up_s(costs: pd.DataFrame) -> float:
    """Shortest pause between two processes on one board (s): at most what a process takes to start.

    It holds the end of one process, the start of Python, imports and the building of the pipeline, and
    whatever the command waited between them.  NaN where no board ran two.
    """
    pauses = costs.loc[costs["new_process"] & (costs["pause_s"] > 0), "pause_s"]
    return float(pauses.min()) if len(pauses) else nan


# --- sets of records ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Videos:
    """What one whole video of a configuration takes here: seconds, its 95 % half-width, and Wh."""

    latency_s: float
    latency_s_ci95: float
    gpu_energy_Wh: float


def videos(configurations: pd.DataFrame) -> dict[str, Videos]:
    """By configuration id, what a video takes: the mean where several experiments measured it.

    The half-width is of that mean, and NaN where one of them is unknown (a single generation).
    """
    rows = configurations[configurations["status"] == "ok"]
    found = {}
    for key, group in rows.groupby("configuration_id"):
        ci95 = sqrt(float((group["latency_s_ci95"] ** 2).sum(skipna=False))) / len(group)
        energy = float(group["gpu_energy_Wh"].mean())
        found[str(key)] = Videos(float(group["latency_s"].mean()), ci95, energy)
    return found


def cost_table(
    records: Mapping[str, list[Record]], configurations: pd.DataFrame, costs: pd.DataFrame | None = None
) -> pd.DataFrame:
    """One row a set of records, columns :data:`COST_COLUMNS`.

    Sets: each experiment; ``figures 2-4`` (:data:`FIGURES`), the same up to 1008×1792 pixels (``figures 2-4,
    published sizes``), and ``campaign``.  In a union a configuration that several experiments have counts
    once for the study's protocol, and as often as it was measured for us.  Configurations that ran out of
    memory cost us time and the protocol nothing, as nothing tells what a video of theirs would take.
    """
    costs = record_costs(records) if costs is None else costs
    per_video, per_process_s = videos(configurations), start_up_s(costs)
    figures = costs["experiment"].isin(FIGURES)
    ordered = sorted(records, key=lambda name: FIGURES.index(name) if name in FIGURES else len(FIGURES))
    sets = {name: costs["experiment"] == name for name in ordered}
    if figures.any():
        sets["figures 2-4"] = figures
        sets["figures 2-4, published sizes"] = figures & (costs["pixels"] <= LARGEST_PUBLISHED)
    sets["campaign"] = pd.Series(True, costs.index)
    rows = [
        {"set": name} | _set_cost(costs[chosen], per_video, per_process_s)
        for name, chosen in sets.items()
        if chosen.any()
    ]
    return pd.DataFrame(rows, columns=list(COST_COLUMNS))


def _set_cost(
    costs: pd.DataFrame, per_video: Mapping[str, Videos], per_process_s: float
) -> dict[str, object]:
    ids = sorted(set(costs.loc[costs["status"] == "ok", "configuration_id"]) & per_video.keys())
    ours_s = float(costs["gpu_s"].sum())
    first_s = float(costs.loc[costs["pass_index"] == 1, "gpu_s"].sum())
    ours_Wh = float(costs["gpu_J"].sum(skipna=False)) / J_PER_WH
    processes = int(costs["new_process"].sum())
    between_s = float(costs.loc[~costs["new_process"], "pause_s"].sum())
    theirs = predicted_protocol([per_video[key] for key in ids])
    with_start_s = ours_s + between_s + processes * per_process_s
    return {
        "configurations": costs["configuration_id"].nunique(),
        "records": len(costs),
        "out_of_memory": int((costs["status"] != "ok").sum()),
        "gpu_s": ours_s,
        **{f"{name}_s": float(costs[f"{name}_s"].sum()) for name in PARTS},
        "between_s": between_s,
        "processes": processes,
        "start_up_s": per_process_s,
        "gpu_energy_Wh": ours_Wh,
        **{f"{n}_energy_Wh": float(costs[f"{n}_J"].sum(skipna=False)) / J_PER_WH for n in PARTS},
        "kind": "measured",
        "gpu_s_one_pass": first_s,
        "protocol_configurations": len(ids),
        "protocol_gpu_s": theirs.latency_s,
        "protocol_gpu_s_ci95": theirs.latency_s_ci95,
        "protocol_gpu_energy_Wh": theirs.gpu_energy_Wh,
        "protocol_kind": "modelled",
        "ratio_gpu_s": _ratio(theirs.latency_s, ours_s),
        "ratio_gpu_energy": _ratio(theirs.gpu_energy_Wh, ours_Wh),
        "ratio_gpu_s_one_pass": _ratio(theirs.latency_s, first_s),
        "ratio_gpu_s_with_start_up": _ratio(theirs.latency_s, with_start_s),
    }


def predicted_protocol(each: Sequence[Videos]) -> Videos:
    """The study's protocol over configurations of which one video each is known: 2 + 5 videos of each.

    Half-widths are combined in quadrature; NaN where one is unknown.
    """
    count = WARMUPS + REPETITIONS
    return Videos(
        latency_s=count * sum(v.latency_s for v in each),
        latency_s_ci95=count * sqrt(sum(v.latency_s_ci95**2 for v in each)) if each else nan,
        gpu_energy_Wh=count * sum(v.gpu_energy_Wh for v in each) if each else nan,
    )


def _ratio(theirs: float, ours: float) -> float:
    return theirs / ours if ours > 0 and isfinite(theirs) and theirs > 0 else nan


def protocol_check(records: Mapping[str, list[Record]], configurations: pd.DataFrame) -> pd.DataFrame:
    """The prediction against records that did run the study's protocol whole, if a campaign has any.

    Columns: ``configuration_id``, ``pass_index``, ``measured_s`` (its warm-ups and generations),
    ``predicted_s`` (from ``sampled`` rows of the same configuration, so not from the record itself) and
    ``difference_percent`` (predicted less measured).
    """
    sampled = videos(configurations[configurations["protocol"] == "sampled"])
    rows = []
    for group in records.values():
        for record in group:
            key = record["configuration_id"]
            if record["status"] == "ok" and _is_the_protocol(record) and key in sampled:
                whole = [k in ("warmup", "generation") for k in record["windows"]["kind"]]
                lengths = np.subtract(record["windows"]["end_s"], record["windows"]["start_s"])
                measured_s = float(lengths[whole].sum())
                predicted_s = predicted_protocol([sampled[key]]).latency_s
                difference = 100 * (predicted_s / measured_s - 1)
                rows.append((key, record["pass_index"], measured_s, predicted_s, difference))
    columns = ["configuration_id", "pass_index", "measured_s", "predicted_s", "difference_percent"]
    return pd.DataFrame(rows, columns=columns).sort_values(["configuration_id", "pass_index"])


def _is_the_protocol(record: Record) -> bool:
    """Two whole warm-ups and five whole generations."""
    windows, steps = record["windows"], record["configuration"]["num_inference_steps"]
    ran = list(zip(windows["kind"], windows["steps"], strict=True))
    return all(
        ran.count((kind, steps)) == sum(k == kind for k, _ in ran) == count
        for kind, count in (("warmup", WARMUPS), ("generation", REPETITIONS))
    )


# --- emissions ----------------------------------------------------------------------------------------------


def carbon_table(costs: pd.DataFrame, grids: Mapping[str, Grid]) -> pd.DataFrame:
    """Emissions of each set of :func:`cost_table` on each grid: gCO₂e of generating the GPU's energy.

    Columns: ``set``, ``grid``, ``year``, ``scope``, ``gco2e_per_kWh`` (a constant), ``gco2e`` and
    ``protocol_gco2e`` (both ``modelled``).  NaN without a counter.
    """
    rows = [
        {
            "set": row["set"], "grid": key, "year": grid.year, "scope": grid.scope,
            "gco2e_per_kWh": grid.gco2e_per_kWh, "gco2e": grid.gco2e(float(row["gpu_energy_Wh"])),
            "protocol_gco2e": grid.gco2e(float(row["protocol_gpu_energy_Wh"])), "kind": "modelled",
        }
        for _, row in costs.iterrows()
        for key, grid in grids.items()
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(CARBON_COLUMNS))


# --- files --------------------------------------------------------------------------------------------------


def cost_latex(costs: pd.DataFrame) -> str:
    """The cost table for LaTeX: hours and kWh of ours and of the study's protocol, and their ratio."""
    rows = [
        (str(row["set"]), str(row["records"]), f"{row['gpu_s'] / 3600:.2f}", _shown(row["gpu_energy_Wh"]),
         str(row["protocol_configurations"]), f"{row['protocol_gpu_s'] / 3600:.2f}",
         _shown(row["protocol_gpu_energy_Wh"]), _shown(row["ratio_gpu_s"], 1, 1))
        for _, row in costs.iterrows()
    ]  # fmt: skip
    header = ("Set", "Records", "GPU time (h)", "GPU energy (kWh)", "Configurations", "Protocol (h)",
              "Protocol (kWh)", "Ratio of times")  # fmt: skip
    caption = (
        "What measuring took (measured), and what the study's protocol would take for the same "
        "configurations (modelled)."
    )
    return booktabs(header, rows, "lrrrrrrr", caption)


def _shown(value: float, per: float = 1000, digits: int = 2) -> str:
    return f"{value / per:.{digits}f}" if isfinite(value) else "–"
