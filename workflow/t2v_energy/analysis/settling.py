"""How a denoising loop begins under the GPU's power limit (``settling.csv``), and when it has settled.

The loop follows the text encoder and idle host work, so it meets a clock that the power limit does not hold
yet.  The limiter then lowers it too far, raises it too far, and so on.  Steps that run meanwhile are not like
those that follow: :data:`t2v_energy.measurement.composition.SETTLED_S` leaves them out of what stands for
steps that were not run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from t2v_energy.analysis.conditions import SOFTWARE_POWER_CAP
from t2v_energy.analysis.numbers import Number, Source, decimals
from t2v_energy.measurement.composition import SETTLED_S, Generation, generations
from t2v_energy.measurement.record import Spans, Windows

Array = NDArray[np.float64]

BIN_S = 0.25
"""Width of a row; sensors are read every 50 ms."""
SHOWN_S = 5.0
"""The table ends here."""
LEAST_LOOP_S = 2 * SETTLED_S
"""Shorter loops have too little of a settled part to be compared with."""
COLUMNS = (
    "from_s", "to_s", "generations", "clock_percent", "clock_percent_std", "power_W", "power_W_std", "kind",
)  # fmt: skip


def settling_table(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """``settling.csv``, columns :data:`COLUMNS`: clock and power against time since the loop's first call.

    Args:
        records: records' JSON as it is.

    Of every measured generation whose loop lasts :data:`LEAST_LOOP_S` or more and is held by the power limit
    once it has settled (in most samples after ``SETTLED_S``): the SM clock, as a percentage of its mean after
    ``SETTLED_S``, and instantaneous power, averaged over each :data:`BIN_S`.  A row gives mean and standard
    deviation over the generations that reach so far.
    """
    found = pd.DataFrame(
        [row for record in records for row in _of_record(record)],
        columns=["bin", "clock_percent", "power_W"],
    )
    rows = [
        {
            "from_s": float(of_bin["bin"].iloc[0]) * BIN_S,
            "to_s": float(of_bin["bin"].iloc[0] + 1) * BIN_S,
            "generations": len(of_bin),
            "clock_percent": of_bin["clock_percent"].mean(),
            "clock_percent_std": of_bin["clock_percent"].std(),
            "power_W": of_bin["power_W"].mean(),
            "power_W_std": of_bin["power_W"].std(),
            "kind": "measured",
        }
        for _, of_bin in found.groupby("bin")
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _of_record(record: Mapping[str, Any]) -> Iterator[tuple[int, float, float]]:
    """(bin, clock in percent, power in watts) of every bin of every generation."""
    samples = record["samples"]
    if record["status"] != "ok" or not samples:
        return
    time_s = np.asarray(samples["time_s"], dtype=np.float64)
    # None, where a sensor was not read, becomes NaN
    clock, power, reasons = (
        np.asarray(samples[name], dtype=np.float64)
        for name in ("sm_clock_MHz", "power_instant_W", "throttle_reasons")
    )
    for generation in generations(Windows(**record["windows"]), Spans(**record["spans"])):
        if generation.loop_s >= LEAST_LOOP_S:
            yield from _of_loop(generation, time_s, clock, power, reasons)


def _of_loop(
    generation: Generation, time_s: Array, clock: Array, power: Array, reasons: Array
) -> Iterator[tuple[int, float, float]]:
    during = (time_s >= generation.loop_start_s) & (time_s < generation.loop_end_s)
    during &= ~np.isnan(clock) & ~np.isnan(power) & ~np.isnan(reasons)
    since_s = time_s[during] - generation.loop_start_s
    settled = since_s >= SETTLED_S
    capped = reasons[during].astype(np.int64) & SOFTWARE_POWER_CAP > 0
    if not settled.any() or capped[settled].mean() <= 0.5:
        return
    percent = 100 * clock[during] / clock[during][settled].mean()
    place = (since_s / BIN_S).astype(np.int64)
    for number in np.unique(place[since_s < SHOWN_S]).tolist():
        own = place == number
        yield number, float(percent[own].mean()), float(power[during][own].mean())


def settling_numbers(table: pd.DataFrame, file: str) -> dict[str, Number]:
    """``validation.settling.*``: how far the clock swings, and its means over whole seconds.

    None without rows.

    ``before`` and ``after`` are the largest deviations before and after ``SETTLED_S``; ``first_second`` is
    the mean of the first second, ``later_seconds`` the largest deviation of a later second's mean.
    """
    if table.empty:
        return {}
    off = table["clock_percent"] - 100
    seconds = off.groupby(table["from_s"].astype(int)).mean()
    values = {
        "before": (off[table["to_s"] <= SETTLED_S].abs().max(), "largest |clock_percent − 100| before"),
        "after": (off[table["from_s"] >= SETTLED_S].abs().max(), "largest |clock_percent − 100| after"),
        "first_second": (seconds.iloc[0], "mean of clock_percent − 100, first second"),
        "later_seconds": (
            seconds.iloc[1:].abs().max(),
            "largest |mean of clock_percent − 100|, later seconds",
        ),
    }
    limit = Source("t2v_energy.measurement.composition", "SETTLED_S", "")
    count = Source(file, "first row", "generations")
    found = {
        "limit": Number(SETTLED_S, "s", "constant", limit, digits=0),
        "generations": Number(int(table["generations"].iloc[0]), "", "constant", count),
    }
    for name, (value, what) in values.items():
        source = Source(file, "all rows", what)
        found[name] = Number(float(value), "%", "measured", source, digits=decimals(float(value), 2))
    return {f"validation.settling.{name}": number for name, number in found.items()}
