"""Conditions of each generation: its board, and clock, temperature and power from the samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from t2v_energy.measurement.composition import Generation, generations
from t2v_energy.measurement.record import Spans, Windows

SOFTWARE_POWER_CAP = 0x4  # nvml.h: nvmlClocksEventReasonSwPowerCap
SLOW = 1.1
"""A generation whose mean step takes this many times the median of its record's generations is slow."""

COLUMNS = (
    "record", "height", "width", "pass_index", "gpu_uuid", "step_s", "samples", "power_W",
    "clock_least_MHz", "clock_median_MHz", "clock_most_MHz", "temperature_least_C", "temperature_most_C",
    "capped_percent",
)  # fmt: skip
"""Columns of :func:`conditions`."""


def conditions(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a measured generation of ``records`` (their JSON as it is), columns :data:`COLUMNS`.

    ``step_s`` is the mean time of a denoising step.  What follows ``samples`` (their number) is of the sensor
    samples within the denoising loop: mean instantaneous power, the SM clock, the temperature, and the share
    of samples at which the power limit held the clock down.  NaN where no sample was read.
    """
    rows = [row for record in records for row in _of_record(record)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _of_record(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    if record["status"] != "ok":
        return []
    configuration, gpu = record["configuration"], record["environment"]["gpu"]
    shared = {
        "record": f"{record['configuration_id']}__{record['protocol']}_r{record['pass_index']}",
        "height": configuration["height"],
        "width": configuration["width"],
        "pass_index": record["pass_index"],
        "gpu_uuid": gpu["uuid"] if gpu else "",
    }
    found = generations(Windows(**record["windows"]), Spans(**record["spans"]))
    return [shared | {"step_s": g.mean_step_s} | _of_loop(record["samples"] or {}, g) for g in found]


def _of_loop(samples: Mapping[str, Any], generation: Generation) -> dict[str, float]:
    time_s = np.asarray(samples.get("time_s", []), dtype=np.float64)
    during = (time_s >= generation.loop_start_s) & (time_s <= generation.loop_end_s)

    def column(name: str) -> np.ndarray:
        values = np.asarray(samples.get(name, []), dtype=np.float64)[during]  # None becomes NaN
        known: np.ndarray = values[~np.isnan(values)]
        return known

    def apply(function: Any, values: np.ndarray) -> float:
        return float(function(values)) if values.size else float("nan")

    clock, temperature = column("sm_clock_MHz"), column("temperature_C")
    capped = column("throttle_reasons").astype(np.int64) & SOFTWARE_POWER_CAP > 0
    return {
        "samples": int(during.sum()),
        "power_W": apply(np.mean, column("power_instant_W")),
        "clock_least_MHz": apply(np.min, clock),
        "clock_median_MHz": apply(np.median, clock),
        "clock_most_MHz": apply(np.max, clock),
        "temperature_least_C": apply(np.min, temperature),
        "temperature_most_C": apply(np.max, temperature),
        "capped_percent": 100 * apply(np.mean, capped),
    }


def slow_generations(generations: pd.DataFrame) -> pd.DataFrame:
    """The rows of every record that has slow generations (:data:`SLOW`), with a column ``slow``."""
    by_record = generations.groupby("record")["step_s"]
    marked = generations.assign(slow=generations["step_s"] > SLOW * by_record.transform("median"))
    return marked[marked.groupby("record")["slow"].transform("any")]
