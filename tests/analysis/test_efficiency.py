"""One µ, one P, cost linear in steps: planted values are found, and what R² hides is told."""

from __future__ import annotations

from math import isnan, sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_sweeps as synthetic
from scipy.stats import t as student_t
from t2v_energy.analysis import efficiency, scaling
from t2v_energy.errors import UserError
from t2v_energy.work import paper_work, true_work

PEAK = 989e12
MU = 0.45


def read(folder: Path, table: pd.DataFrame) -> scaling.Campaign:
    return scaling.read_campaign(synthetic.root(folder / "root", table), "h200", synthetic.CONFIGURATIONS)


def flop(row: pd.Series, count: str = "true") -> float:
    size = [int(row[c]) for c in ("height", "width", "num_frames", "num_inference_steps")]
    if count == "true":
        return true_work(synthetic.MODEL, *size).total_flop
    if row["experiment"] == "frames":
        size[2] -= 1  # the study's sweep lists T = 4k where the pipeline makes 4k + 1
    return paper_work(*size).total_flop


def compute_bound(overhead_s: float = 0.0, count: str = "true") -> pd.DataFrame:
    """The synthetic rows with latency = overhead + FLOP / (µ Θ)."""
    table = synthetic.configurations()
    return table.assign(
        latency_s=[overhead_s + flop(row, count) / (MU * PEAK) for _, row in table.iterrows()]
    )


def line(table: pd.DataFrame, **keys: str) -> pd.Series:
    for column, value in keys.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_a_regression_equals_one_computed_by_hand() -> None:
    # x = 1, 2, 3; y = 2, 3, 5: slope 3/2, intercept 1/3; residuals 1/6, −1/3, 1/6; s² = 1/6
    fit = efficiency.regression([1.0, 2.0, 3.0], [2.0, 3.0, 5.0], through_origin=False)
    quantile = float(student_t.ppf(0.975, 1))
    assert (fit.slope, fit.intercept) == (pytest.approx(1.5), pytest.approx(1 / 3))
    assert fit.slope_half == pytest.approx(quantile * sqrt(1 / 6 / 2))
    assert fit.intercept_half == pytest.approx(quantile * sqrt(1 / 6 * (1 / 3 + 4 / 2)))
    assert fit.r2 == pytest.approx(1 - (1 / 6) / (14 / 3))
    origin = efficiency.regression([1.0, 2.0, 3.0], [2.0, 3.0, 5.0], through_origin=True)
    assert origin.slope == pytest.approx(23 / 14)
    square = 38 - 23**2 / 14
    assert origin.r2 == pytest.approx(1 - square / (14 / 3))
    assert origin.r2_about_zero == pytest.approx(1 - square / 38)
    assert isnan(origin.intercept_half)


@pytest.mark.parametrize("x", [[1.0, 2.0], [2.0, 2.0, 2.0]])
def test_a_regression_that_cannot_be_is_refused(x: list[float]) -> None:
    with pytest.raises(UserError, match="more than 2 points"):
        efficiency.regression(x, x, through_origin=False)


@pytest.mark.parametrize("count", ["true", "study"])
def test_a_planted_efficiency_is_found_in_every_set(tmp_path: Path, count: str) -> None:
    table = efficiency.efficiency_table(read(tmp_path, compute_bound(count=count)))
    assert list(table.columns) == list(efficiency.EFFICIENCY_COLUMNS)
    fits = table[(table["count"] == count) & (table["regression"] == "origin")]
    assert set(fits["set"]) == {"resolution", "frames", "steps", "resolution+frames+steps", "kernels"}
    np.testing.assert_allclose(fits["efficiency"], MU, rtol=1e-9)
    np.testing.assert_allclose(fits["r2"], 1)


def test_a_planted_overhead_is_the_intercept_and_shows_in_the_errors(tmp_path: Path) -> None:
    table = efficiency.efficiency_table(read(tmp_path, compute_bound(overhead_s=5.0)))
    keys = {"set": "resolution", "count": "true"}
    with_intercept = line(table, **keys, regression="intercept")
    assert with_intercept["intercept_s"] == pytest.approx(5)
    assert with_intercept["efficiency"] == pytest.approx(MU)
    origin = line(table, **keys, regression="origin")
    assert origin["r2"] > 0.999
    assert abs(origin["largest_error_percent"]) > 30  # of the smallest size


def test_each_kernel_has_its_own_efficiency(tmp_path: Path) -> None:
    table = efficiency.efficiency_table(read(tmp_path, synthetic.configurations()))
    fits = table[(table["set"] == "kernels") & (table["count"] == "true") & (table["regression"] == "origin")]
    by_kernel = fits.set_index("attention_kernel")
    assert list(by_kernel["n"]) == [5, 5]
    assert by_kernel["efficiency"]["cudnn"] > 1.2 * by_kernel["efficiency"]["flash"]


def test_sets_that_are_not_measured_are_left_out(tmp_path: Path) -> None:
    table = synthetic.configurations()
    campaign = read(tmp_path, table[table["experiment"].isin(["resolution", "frames"])])
    assert set(efficiency.efficiency_table(campaign)["set"]) == {"resolution", "frames", "resolution+frames"}
    assert efficiency.steps_table(campaign).empty
    without = read(tmp_path / "no", table.assign(gpu_energy_Wh=np.nan))
    assert efficiency.power_table(without).empty
    assert set(efficiency.steps_table(without)["quantity"]) == {"latency_s"}


def test_constant_power_is_constant_and_its_distance_from_the_limit_is_told(tmp_path: Path) -> None:
    row = line(efficiency.power_table(read(tmp_path, synthetic.configurations())), set="resolution")
    assert row["mean_W"] == pytest.approx(synthetic.POWER_W)
    assert row["regression_W"] == pytest.approx(synthetic.POWER_W)
    assert row["variation_percent"] == pytest.approx(0, abs=1e-9)
    assert row["slope_W_per_decade"] == pytest.approx(0, abs=1e-6)
    assert row["max_power_error_mean_percent"] == pytest.approx(100 * (700 / synthetic.POWER_W - 1))


def test_power_that_grows_with_latency_is_seen(tmp_path: Path) -> None:
    table = synthetic.configurations()
    power = 600 + 20 * np.log10(table["latency_s"])
    found = efficiency.power_table(
        read(tmp_path, table.assign(gpu_energy_Wh=power * table["latency_s"] / 3600))
    )
    row = line(found, set="resolution")
    assert row["slope_W_per_decade"] == pytest.approx(20)
    assert row["least_W"] < row["mean_W"] < row["most_W"]


def test_planted_steps_are_linear_with_the_planted_once(tmp_path: Path) -> None:
    table = efficiency.steps_table(read(tmp_path, synthetic.configurations()))
    assert list(table.columns) == list(efficiency.STEPS_COLUMNS)
    assert len(table) == 4
    row = table[(table["height"] == 720) & (table["quantity"] == "latency_s")].iloc[0]
    each = synthetic.step_s(synthetic.tokens(720, 1280, 81))
    assert row["once"] == pytest.approx(synthetic.ONCE_S)
    assert row["per_step"] == pytest.approx(each)
    assert (row["once_direct"], row["per_step_direct"]) == (synthetic.ONCE_S, pytest.approx(each))
    assert row["largest_residual_percent"] == pytest.approx(0, abs=1e-6)
    assert row["curvature_percent"] == pytest.approx(0, abs=1e-6)
    energy = table[(table["height"] == 720) & (table["quantity"] == "gpu_energy_Wh")].iloc[0]
    assert energy["once"] == pytest.approx(synthetic.ONCE_S * synthetic.POWER_W / 3600)
    assert energy["once_direct"] == pytest.approx(energy["once"])
    assert energy["unit"] == "Wh"


def test_a_planted_curvature_is_found(tmp_path: Path) -> None:
    table = synthetic.configurations()
    steps = table["experiment"] == "steps"
    bent = table["latency_s"].where(~steps, table["latency_s"] + 1e-3 * table["num_inference_steps"] ** 2)
    found = efficiency.steps_table(read(tmp_path, table.assign(latency_s=bent)))
    row = found[(found["height"] == 480) & (found["quantity"] == "latency_s")].iloc[0]
    assert row["curvature"] == pytest.approx(1e-3)
    cost = bent[steps & (table["height"] == 480)].max()
    assert row["curvature_percent"] == pytest.approx(100 * 1e-3 * 50**2 / cost)
    assert row["largest_residual_percent"] > 0.1
