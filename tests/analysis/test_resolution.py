"""Sweeps, the fit of µ, curves and figure 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_campaign as synthetic
from t2v_energy.analysis import style, sweep_figure
from t2v_energy.analysis import sweep as resolution
from t2v_energy.errors import UserError
from t2v_energy.work import OPERATORS, paper

CONFIGURATIONS = Path("results/aggregated/h200/configurations.csv")


@pytest.fixture
def sweep(tmp_path: Path) -> resolution.Sweep:
    return read(tmp_path, synthetic.configurations())


def read(folder: Path, table: pd.DataFrame) -> resolution.Sweep:
    return resolution.read_sweep(synthetic.root(folder / "root", table), "h200", CONFIGURATIONS)


def test_only_measured_rows_of_the_experiment_are_read_in_order_of_pixels(sweep: resolution.Sweep) -> None:
    assert list(sweep.rows["pixels"]) == sorted(h * w for h, w in synthetic.SIZES)
    assert set(sweep.rows["experiment"]) == {"resolution"}


def test_a_missing_table_and_an_empty_experiment_say_what_to_do(tmp_path: Path) -> None:
    base = synthetic.root(tmp_path / "root", synthetic.configurations())
    with pytest.raises(UserError, match="stage 3"):
        resolution.read_sweep(base, "h200", Path("nowhere.csv"))
    with pytest.raises(UserError, match="0 measured rows"):
        resolution.read_sweep(base, "h200", CONFIGURATIONS, experiment="steps")


def test_the_regression_recovers_a_planted_efficiency(sweep: resolution.Sweep) -> None:
    fit = sweep.predictors["single_mu"].fit
    assert fit is not None
    assert fit.value == pytest.approx(synthetic.MU, rel=1e-6)
    assert fit.low <= fit.value <= fit.high
    assert fit.r2 == pytest.approx(1)
    np.testing.assert_allclose(sweep.predicted("single_mu", "latency_s"), sweep.rows["latency_s"])


def test_the_slope_and_its_interval_equal_a_hand_computed_regression() -> None:
    # x = 1, 2; y = 2, 3: slope 8/5; residual 0.2 = s²; standard error sqrt(0.2/5) = 0.2; t(1) = 12.7062
    fit = resolution.fit_efficiency([1.0, 2.0], [2.0, 3.0], 1.0)
    assert fit.value == pytest.approx(1 / 1.6)
    assert fit.low == pytest.approx(1 / (1.6 + 12.7062 * 0.2), rel=1e-5)
    assert fit.high == float("inf")  # the slope's interval reaches below zero
    assert fit.r2 == pytest.approx(1 - 0.2 / 0.5)


@pytest.mark.parametrize(
    ("flop", "latency"), [([1.0], [1.0]), ([1.0, 2.0], [1.0, -1.0]), ([1.0, 2.0], [1.0])]
)
def test_a_fit_that_cannot_be_is_refused(flop: list[float], latency: list[float]) -> None:
    with pytest.raises(UserError, match="at least two points"):
        resolution.fit_efficiency(flop, latency, 1.0)


def test_the_printed_predictor_is_the_studys_model(sweep: resolution.Sweep) -> None:
    flop = sweep.flop("study").sum(axis=1)
    expected = [paper.latency_s(f) for f in flop]
    np.testing.assert_allclose(sweep.predicted("paper", "latency_s"), expected)
    np.testing.assert_allclose(sweep.predicted("paper", "gpu_energy_Wh"), [paper.energy_Wh(f) for f in flop])


@pytest.mark.parametrize("count", ["study", "true"])
def test_curves_over_pixels_hold_for_every_shape(sweep: resolution.Sweep, count: resolution.Count) -> None:
    curve = resolution.flop_curve(count, sweep.model, (480 * 832, 720 * 1280), 81, 50)
    for row, size in ((0, (480, 832)), (-1, (720, 1280))):
        flop = resolution.count_work(count, sweep.model, *size, 81, 50).flop
        assert curve["pixels"].iloc[row] == size[0] * size[1]
        for operator in OPERATORS:
            assert curve[operator].iloc[row] == pytest.approx(flop[operator])


def test_the_local_exponent_is_a_slope_with_the_points_own_intervals() -> None:
    first, second = pd.Series({"t": 1.0, "t_ci95": 0.03}), pd.Series({"t": 8.0, "t_ci95": 0.32})
    slope, half = resolution.local_exponent(first, second, "t", (10.0, 40.0))
    assert slope == pytest.approx(1.5)
    assert half == pytest.approx(0.05 / np.log(4))


def test_sizes_are_looked_up_and_doubles_refused(sweep: resolution.Sweep, tmp_path: Path) -> None:
    row = sweep.at(480, 832)
    assert row is not None
    assert row["width"] == 832
    assert sweep.at(16, 16) is None
    table = synthetic.configurations()
    twice = read(tmp_path / "twice", pd.concat([table, table.assign(attention_kernel="flash")]))
    with pytest.raises(UserError, match="2 rows"):
        twice.at(480, 832)
    mixed = read(tmp_path / "mixed", pd.concat([table, table.assign(num_frames=41)]))
    with pytest.raises(UserError, match="41, 81"):
        mixed.fixed("num_frames")


def test_each_board_is_a_sweep_of_its_own_sizes(sweep: resolution.Sweep) -> None:
    boards = sweep.boards
    assert list(boards) == ["GPU-C", "GPU-A", "GPU-B"]
    assert [len(board.rows) for board in boards.values()] == [5, 4, 1]
    fit = boards["GPU-A"].predictors["single_mu"].fit
    assert fit is not None
    slower = synthetic.SLOWER
    assert fit.value == pytest.approx(synthetic.MU * (1 + slower) / (2 * slower), rel=1e-6)
    energy, latency = (boards["GPU-A"].rows[name] for name in ("gpu_energy_Wh", "latency_s"))
    np.testing.assert_allclose(3600 * energy / latency, synthetic.POWER_W)


@pytest.mark.parametrize("uuids", ["GPU-A", "", float("nan"), "GPU-A;"])
def test_passes_without_a_board_each_belong_to_none(uuids: object) -> None:
    row = pd.Series({"latency_s_pass_means": "2;4", "gpu_uuids": uuids})
    assert resolution.board_means(row, "latency_s") == {}


def test_passes_of_one_board_are_averaged() -> None:
    row = pd.Series({"latency_s_pass_means": "2;5;4", "gpu_uuids": "A;B;A"})
    assert resolution.board_means(row, "latency_s") == {"A": 3, "B": 5}
    assert resolution.pass_means(pd.Series({"latency_s_pass_means": 2.5}), "latency_s") == [2.5]


def test_bars_show_the_passes_where_they_lie_further_apart_than_the_interval() -> None:
    rows = pd.DataFrame(
        {
            "t": [100.0, 100.0, 100.0],
            "t_ci95": [1.0, 3.0, np.nan],
            "t_pass_spread_percent": [4.0, 4.0, np.nan],
        }
    )
    assert resolution.half_bars(rows, "t").tolist() == [2, 3, 0]


def test_figure_2_has_four_panels_with_strips_units_and_one_legend(sweep: resolution.Sweep) -> None:
    figure = sweep_figure.figure_resolution(sweep)
    labels = {axes.get_ylabel() for axes in figure.axes}
    assert labels == {"Latency of one video (s)", "GPU energy of one video (Wh)", "Error (%)"}
    assert len(figure.axes) == 8
    assert len(figure.legends) == 1
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [style.OPERATOR_LABELS[o] for o in OPERATORS] == texts[: len(OPERATORS)]
    assert any("95 %" in text for text in texts)
    notes = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert sum("µ = 0.500, fitted" in note for note in notes) == 2


def test_without_a_counter_the_cpus_energy_is_shown_and_called_modelled(tmp_path: Path) -> None:
    table = synthetic.configurations().assign(gpu_energy_Wh=float("nan"), gpu_energy_Wh_kind="")
    figure = sweep_figure.figure_resolution(read(tmp_path, table))
    assert "CPU energy (modelled), Wh" in {axes.get_ylabel() for axes in figure.axes}
