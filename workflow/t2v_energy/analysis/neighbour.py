"""Experiment ``neighbour``: what a busy GPU beside it does to a GPU's own seconds and joules."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from t2v_energy.errors import UserError
from t2v_energy.measurement.composition import CONFIDENCE

EXPERIMENT = "neighbour"
QUANTITIES = ("latency_s", "gpu_energy_Wh")
COLUMNS = (
    "configuration", "quantity", "alone", "busy", "difference_percent", "difference_percent_ci95_low",
    "difference_percent_ci95_high", "n", "kind", "neighbours_power_W_alone", "neighbours_power_W_busy",
)  # fmt: skip


def neighbour_table(configurations: pd.DataFrame) -> pd.DataFrame:
    """``neighbour.csv``: each quantity of a video with the neighbour idle and busy, by configuration.

    The difference is paired: each pass measures both conditions within a minute of each other, in an order
    of its own. Its percentage of the pass's own idle value is averaged over the ``n`` passes, and the
    interval is Student's t over them (95 %), so that slow drifts of both cancel. NaN with one pass.

    Args:
        configurations: configurations.csv; without rows of the experiment, the table is empty.

    Raises:
        UserError: a configuration has one condition alone, or other passes of one than of the other.
    """
    rows = configurations[
        (configurations["experiment"] == EXPERIMENT) & (configurations["status"] == "ok")
    ].copy()
    rows["base"] = rows["configuration_id"].str.replace(r"__neighbour-(idle|busy)", "", regex=True)
    table = [row for base, both in rows.groupby("base", sort=True) for row in _compared(str(base), both)]
    return pd.DataFrame(table, columns=list(COLUMNS))


def _compared(base: str, both: pd.DataFrame) -> list[dict[str, object]]:
    by_condition = {str(row["neighbour"]): row for _, row in both.iterrows()}
    if set(by_condition) != {"idle", "busy"}:
        raise UserError(
            f"{base} was measured with the neighbour {' and '.join(sorted(by_condition))} alone",
            where="configurations.csv, experiment neighbour",
            remedy="measure the whole experiment",
        )
    idle, busy = by_condition["idle"], by_condition["busy"]
    return [_difference(base, quantity, idle, busy) for quantity in QUANTITIES if pd.notna(idle[quantity])]


def _difference(base: str, quantity: str, idle: pd.Series, busy: pd.Series) -> dict[str, object]:
    alone, beside = (_pass_means(row, quantity) for row in (idle, busy))
    if len(alone) != len(beside):
        raise UserError(
            f"{base} has {len(alone)} passes beside an idle neighbour and {len(beside)} beside a busy one",
            where="configurations.csv, experiment neighbour",
            remedy="measure the rest: t2v-energy measure --experiment neighbour",
        )
    percent = 100 * (beside / alone - 1)
    half = np.nan
    if len(percent) > 1:
        quantile = student_t.ppf((1 + CONFIDENCE) / 2, len(percent) - 1)
        half = float(quantile * percent.std(ddof=1) / sqrt(len(percent)))
    mean = float(percent.mean())
    found = (
        base, quantity, float(alone.mean()), float(beside.mean()), mean, mean - half, mean + half,
        len(percent), "measured", idle["neighbours_power_W"], busy["neighbours_power_W"],
    )  # fmt: skip
    return dict(zip(COLUMNS, found, strict=True))


def _pass_means(row: pd.Series, quantity: str) -> np.ndarray:
    return np.array([float(mean) for mean in str(row[f"{quantity}_pass_means"]).split(";")])
