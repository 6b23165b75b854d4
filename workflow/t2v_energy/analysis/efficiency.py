"""One efficiency µ, one power P, and cost linear in the steps: the study's model, regression by regression.

The study has D = F / (µ Θ_peak) with one µ for everything, "calibrated by linear regression of measured
latencies against theoretical FLOPs", R² = 0.998 (section 3.4); E = P_max · D with P_max = 700 W (section
3.5); and a cost that is "perfectly linear" in the steps S (section 5.1.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

from t2v_energy.analysis.scaling import (
    CONFIDENCE,
    SETS,
    VIDEO_QUANTITIES,
    Array,
    Campaign,
    Polynomial,
    fit_polynomial,
    steps_by_size,
)
from t2v_energy.analysis.sweep import J_PER_WH, Count, count_work, counted_frames
from t2v_energy.errors import UserError

COUNTS: tuple[Count, ...] = ("study", "true")
MIN_POINTS = 3

EFFICIENCY_COLUMNS = (
    "set", "attention_kernel", "count", "regression", "efficiency", "efficiency_ci95_low",
    "efficiency_ci95_high", "intercept_s", "intercept_s_ci95", "r2", "r2_about_zero", "n",
    "largest_error_percent",
)  # fmt: skip
POWER_COLUMNS = (
    "set", "attention_kernel", "n", "mean_W", "least_W", "most_W", "std_W", "variation_percent",
    "slope_W_per_decade", "slope_W_per_decade_ci95", "regression_W", "regression_W_ci95_low",
    "regression_W_ci95_high", "r2", "r2_about_zero", "max_power_W", "max_power_error_mean_percent",
    "max_power_error_least_percent", "max_power_error_most_percent",
)  # fmt: skip
STEPS_COLUMNS = (
    "height", "width", "num_frames", "quantity", "unit", "n", "steps_least", "steps_most", "once",
    "once_ci95", "per_step", "per_step_ci95", "r2", "largest_residual_percent", "once_direct",
    "per_step_direct", "curvature", "curvature_ci95", "curvature_percent", "curvature_percent_ci95",
)  # fmt: skip


# --- straight lines -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regression:
    """Ordinary least squares of y on x, through the origin or with an intercept; t-intervals of 95 %.

    Attributes:
        slope, slope_half: and half-width.
        intercept, intercept_half: 0 and NaN through the origin.
        r2: 1 − residual / total sum of squares of y about its mean, with or without an intercept.
        r2_about_zero: the same about zero, which is what some programs print for a line through the origin.
        n: points.
    """

    slope: float
    slope_half: float
    intercept: float
    intercept_half: float
    r2: float
    r2_about_zero: float
    n: int

    def predict(self, x: ArrayLike) -> Array:
        """The line's y."""
        return np.asarray(self.intercept + self.slope * np.asarray(x, dtype=np.float64), dtype=np.float64)


def regression(x: ArrayLike, y: ArrayLike, *, through_origin: bool) -> Regression:
    """Least squares of y on x.

    Raises:
        UserError: no more points than coefficients, or all x alike.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    coefficients = 1 if through_origin else 2
    if a.size != b.size or a.size <= coefficients or np.unique(a).size < 2:
        raise UserError(
            f"a regression with {coefficients} coefficients needs more than {coefficients} points at "
            f"different x; there are {a.size} x and {b.size} y",
            remedy="measure more configurations of the experiment",
        )
    scale = float(np.abs(a).max())
    design = (a / scale)[:, None] if through_origin else np.stack([a / scale, np.ones_like(a)], axis=1)
    solution = np.linalg.lstsq(design, b, rcond=None)[0]
    square = float(np.sum((b - design @ solution) ** 2))
    freedom = a.size - coefficients
    error = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * square / freedom)
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    total = float(np.sum((b - b.mean()) ** 2))
    return Regression(
        slope=float(solution[0]) / scale,
        slope_half=float(half[0]) / scale,
        intercept=0.0 if through_origin else float(solution[1]),
        intercept_half=nan if through_origin else float(half[1]),
        r2=1 - square / total if total else nan,
        r2_about_zero=1 - square / float(b @ b),
        n=a.size,
    )


# --- µ ------------------------------------------------------------------------------------------------------


def row_groups(campaign: Campaign) -> dict[tuple[str, str], pd.DataFrame]:
    """Rows by set and attention kernel: the sweeps, all of them together, and each kernel of ``kernels``."""
    groups = {(name, _kernels(rows)): rows for name in SETS if len(rows := campaign.of(name))}
    if len(groups) > 1:
        together = pd.concat(list(groups.values()))
        groups[("+".join(name for name, _ in groups), _kernels(together))] = together
    kernels = campaign.of("kernels").groupby("attention_kernel", sort=True)
    return groups | {("kernels", str(kernel)): rows for kernel, rows in kernels}


def _kernels(rows: pd.DataFrame) -> str:
    return "+".join(sorted({str(kernel) for kernel in rows["attention_kernel"]}))


def total_flop(campaign: Campaign, rows: pd.DataFrame, count: Count) -> Array:
    """FLOP of one video for each row, by one of the two counts."""
    found = []
    for _, row in rows.iterrows():
        frames = counted_frames(count, str(row["experiment"]), int(row["num_frames"]))
        size = (int(row["height"]), int(row["width"]), frames, int(row["num_inference_steps"]))
        found.append(count_work(count, campaign.model, *size).total_flop)
    return np.array(found)


def efficiency_table(campaign: Campaign) -> pd.DataFrame:
    """efficiency.csv, columns :data:`EFFICIENCY_COLUMNS`: µ = 1 / (slope · Θ_peak) of latency over FLOP.

    Seconds are fitted, as the study did, so that the dearest configurations decide.
    ``largest_error_percent`` is the largest relative error over the points that were fitted.
    """
    lines = []
    peak = campaign.accelerator.peak_bf16_dense_TFLOPs * 1e12
    for (name, kernel), rows in row_groups(campaign).items():
        if len(rows) < MIN_POINTS:
            continue
        for count in COUNTS:
            flop, latency = total_flop(campaign, rows, count), rows["latency_s"].to_numpy(dtype=np.float64)
            if np.unique(flop).size < 2:
                continue
            for label, through_origin in (("origin", True), ("intercept", False)):
                fit = regression(flop, latency, through_origin=through_origin)
                error = 100 * (fit.predict(flop) / latency - 1)
                low, value, high = (
                    1 / (slope * peak) if slope > 0 else nan
                    for slope in (fit.slope + fit.slope_half, fit.slope, fit.slope - fit.slope_half)
                )
                lines.append(
                    (name, kernel, count, label, value, low, high, fit.intercept, fit.intercept_half, fit.r2,
                     fit.r2_about_zero, fit.n, float(error[np.abs(error).argmax()]))
                )  # fmt: skip
    return pd.DataFrame(lines, columns=list(EFFICIENCY_COLUMNS))


# --- P ------------------------------------------------------------------------------------------------------


def power_table(campaign: Campaign) -> pd.DataFrame:
    """power.csv, columns :data:`POWER_COLUMNS`: how constant mean power is, and E = P · D with one P.

    ``regression_W`` is the slope of energy over latency through the origin; ``slope_W_per_decade`` that of
    mean power over log10 of latency.  The errors are of E = P_max · D, P_max the board's power, with the
    measured latency: signed, in percent of the measured energy; ``mean`` is of absolute values.
    """
    lines = []
    limit = float(campaign.accelerator.board_power_W)
    for (name, kernel), group in row_groups(campaign).items():
        rows = group[group["gpu_energy_Wh"].notna()]
        if len(rows) < MIN_POINTS:
            continue
        latency, energy = (rows[q].to_numpy(dtype=np.float64) for q in VIDEO_QUANTITIES)
        power = J_PER_WH * energy / latency
        fit = regression(latency, J_PER_WH * energy, through_origin=True)
        trend = regression(np.log10(latency), power, through_origin=False)
        error = 100 * (limit / power - 1)
        spread = float(np.std(power, ddof=1))
        lines.append(
            (name, kernel, len(rows), power.mean(), power.min(), power.max(), spread,
             100 * spread / power.mean(), trend.slope, trend.slope_half,
             fit.slope, fit.slope - fit.slope_half, fit.slope + fit.slope_half, fit.r2, fit.r2_about_zero,
             limit, np.abs(error).mean(), error.min(), error.max())
        )  # fmt: skip
    return pd.DataFrame(lines, columns=list(POWER_COLUMNS))


# --- S ------------------------------------------------------------------------------------------------------


def steps_table(campaign: Campaign) -> pd.DataFrame:
    """steps.csv, columns :data:`STEPS_COLUMNS`: cost = once + per_step · S from whole generations, by size.

    Least squares of relative errors, since S spans orders of magnitude.  ``curvature`` is the coefficient of
    S² when it is fitted too; ``curvature_percent`` says what it makes at the most steps, in percent of the
    cost there.  ``once_direct`` and ``per_step_direct`` come from the spans of the same generations: of the
    row with the most steps, and, what comes once, of the mean of all rows.
    """
    lines = [
        line
        for rows in steps_by_size(campaign).values()
        for quantity in VIDEO_QUANTITIES
        if (line := _steps_line(rows[rows[quantity].notna()], quantity)) is not None
    ]
    return pd.DataFrame(lines, columns=list(STEPS_COLUMNS))


def _steps_line(rows: pd.DataFrame, quantity: str) -> dict[str, object] | None:
    if rows["num_inference_steps"].nunique() < MIN_POINTS:
        return None
    steps, cost = (rows[c].to_numpy(dtype=np.float64) for c in ("num_inference_steps", quantity))
    line = fit_polynomial(steps, cost, 1)
    once, per_step = _direct(rows, quantity)
    most = rows.iloc[int(steps.argmax())]
    found = {
        "height": most["height"], "width": most["width"], "num_frames": most["num_frames"],
        "quantity": quantity, "unit": quantity.rsplit("_", 1)[1], "n": len(rows),
        "steps_least": int(steps.min()), "steps_most": int(steps.max()),
        "once": line.coefficients[0], "once_ci95": line.half_widths[0],
        "per_step": line.coefficients[1], "per_step_ci95": line.half_widths[1],
        "r2": line.r2, "largest_residual_percent": float(np.abs(line.residual_percent).max()),
        "once_direct": once, "per_step_direct": per_step,
    }  # fmt: skip
    return found | _curvature(fit_polynomial(steps, cost, 2), float(steps.max()), float(cost.max()))


def _curvature(parabola: Polynomial, most_steps: float, cost: float) -> dict[str, float]:
    value, half = float(parabola.coefficients[2]), float(parabola.half_widths[2])
    percent = 100 * most_steps**2 / cost
    return {
        "curvature": value, "curvature_ci95": half,
        "curvature_percent": value * percent, "curvature_percent_ci95": half * percent,
    }  # fmt: skip


def _direct(rows: pd.DataFrame, quantity: str) -> tuple[float, float]:
    """What comes once and what comes each step, from spans: in the quantity's unit."""
    most = rows.iloc[int(rows["num_inference_steps"].to_numpy().argmax())]
    if quantity == "latency_s":
        return float(rows["once_s"].mean()), float(most["step_time_s"])
    each = rows["step_energy_J"] / J_PER_WH
    once = rows["gpu_energy_Wh"] - each * rows["num_inference_steps"]
    return float(once.mean()), float(most["step_energy_J"]) / J_PER_WH
