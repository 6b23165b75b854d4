"""Sweeps, the fit of µ and curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_campaign as synthetic
from t2v_energy.analysis import sweep as sweeps
from t2v_energy.errors import UserError
from t2v_energy.work import OPERATORS, paper

CONFIGURATIONS = Path("results/aggregated/h200/configurations.csv")
SHAPES = ((624, 640), (416, 960), (832, 480))


@pytest.fixture
def sweep(tmp_path: Path) -> sweeps.Sweep:
    return read(tmp_path, synthetic.configurations())


def read(folder: Path, table: pd.DataFrame, experiment: str = "resolution") -> sweeps.Sweep:
    return sweeps.read_sweep(synthetic.root(folder / "root", table), "h200", CONFIGURATIONS, experiment)


def test_only_measured_rows_of_the_experiment_are_read_in_order_of_pixels(sweep: sweeps.Sweep) -> None:
    assert list(sweep.rows["pixels"]) == sorted(h * w for h, w in synthetic.SIZES)
    assert set(sweep.rows["experiment"]) == {"resolution"}


def test_a_missing_table_and_an_empty_experiment_say_what_to_do(tmp_path: Path) -> None:
    base = synthetic.root(tmp_path / "root", synthetic.configurations())
    with pytest.raises(UserError, match="stage 3"):
        sweeps.read_sweep(base, "h200", Path("nowhere.csv"))
    with pytest.raises(UserError, match="0 measured rows"):
        sweeps.read_sweep(base, "h200", CONFIGURATIONS, experiment="cross-model")


def test_the_regression_recovers_a_planted_efficiency(sweep: sweeps.Sweep) -> None:
    fit = sweep.predictors["single_mu"].fit
    assert fit is not None
    assert fit.value == pytest.approx(synthetic.MU, rel=1e-6)
    assert fit.low <= fit.value <= fit.high
    assert fit.r2 == pytest.approx(1)
    np.testing.assert_allclose(
        sweep.predicted(sweep.predictors["single_mu"], "latency_s"), sweep.rows["latency_s"]
    )


def test_the_slope_and_its_interval_equal_a_hand_computed_regression() -> None:
    # x = 1, 2; y = 2, 3: slope 8/5; residual 0.2 = s²; standard error sqrt(0.2/5) = 0.2; t(1) = 12.7062
    fit = sweeps.fit_efficiency([1.0, 2.0], [2.0, 3.0], 1.0)
    assert fit.value == pytest.approx(1 / 1.6)
    assert fit.low == pytest.approx(1 / (1.6 + 12.7062 * 0.2), rel=1e-5)
    assert fit.high == float("inf")  # the slope's interval reaches below zero
    assert fit.r2 == pytest.approx(1 - 0.2 / 0.5)
    assert fit.heaviest_percent == pytest.approx(100 * 4 / 5)


@pytest.mark.parametrize(
    ("flop", "latency"), [([1.0], [1.0]), ([1.0, 2.0], [1.0, -1.0]), ([1.0, 2.0], [1.0])]
)
def test_a_fit_that_cannot_be_is_refused(flop: list[float], latency: list[float]) -> None:
    with pytest.raises(UserError, match="at least two points"):
        sweeps.fit_efficiency(flop, latency, 1.0)


def test_the_printed_predictor_is_the_studys_model(sweep: sweeps.Sweep) -> None:
    flop = sweep.flop("study").sum(axis=1)
    expected = [paper.latency_s(f) for f in flop]
    printed = sweep.predictors["paper"]
    np.testing.assert_allclose(sweep.predicted(printed, "latency_s"), expected)
    np.testing.assert_allclose(sweep.predicted(printed, "gpu_energy_Wh"), [paper.energy_Wh(f) for f in flop])


@pytest.mark.parametrize("count", ["study", "true"])
def test_curves_over_pixels_hold_for_every_shape(sweep: sweeps.Sweep, count: sweeps.Count) -> None:
    held = {"num_frames": 81, "num_inference_steps": 50}
    curve = sweeps.flop_curve(count, sweep.model, "pixels", (480 * 832, 720 * 1280), held)
    for row, size in ((0, (480, 832)), (-1, (720, 1280))):
        flop = sweeps.count_work(count, sweep.model, *size, 81, 50).flop
        assert curve["pixels"].iloc[row] == size[0] * size[1]
        for operator in OPERATORS:
            assert curve[operator].iloc[row] == pytest.approx(flop[operator])


@pytest.mark.parametrize("experiment", ["resolution", "frames"])
@pytest.mark.parametrize("count", ["study", "true"])
def test_a_curve_goes_through_the_work_of_the_measured_rows(
    tmp_path: Path, experiment: str, count: sweeps.Count
) -> None:
    sweep = read(tmp_path, synthetic.configurations(), experiment)
    curve = sweep.curve(count).set_index(sweep.varied.column)
    ends = sweep.rows.iloc[[0, -1]]
    for _, row in ends.iterrows():
        flop = sweep.work(count, row).flop
        assert curve.loc[row[sweep.varied.column], list(OPERATORS)].to_dict() == pytest.approx(flop)
    assert curve.index.is_unique
    if experiment == "frames":
        assert list(curve.index) == list(range(5, 102, 4))  # the only lengths that the pipeline makes


def test_each_size_of_the_steps_is_a_sweep_of_its_own_with_a_straight_curve(tmp_path: Path) -> None:
    sweep = read(tmp_path, synthetic.configurations(), "steps")
    assert {size: list(part.rows["num_inference_steps"]) for size, part in sweep.by_size.items()} == {
        size: list(steps) for size, steps in synthetic.STEPS.items()
    }
    with pytest.raises(UserError, match="differ in height"):
        sweep.curve("true")
    curve = sweep.by_size[480, 832].curve("true")
    per_step = np.diff(curve["mlp"]) / np.diff(curve["num_inference_steps"])
    np.testing.assert_allclose(per_step, per_step[0])
    assert curve["vae"].nunique() == 1
    assert (curve["num_inference_steps"].min(), curve["num_inference_steps"].max()) == (1, 200)


def test_one_efficiency_is_fitted_to_the_rows_of_all_sweeps(tmp_path: Path) -> None:
    table = synthetic.configurations()
    slow = table["experiment"] == "frames"
    table.loc[slow, "latency_s"] *= 1.1
    base = synthetic.root(tmp_path / "root", table)
    found = sweeps.read_sweeps(base, "h200", CONFIGURATIONS)
    assert list(found) == ["resolution", "frames", "steps"]
    fit = sweeps.fit_predictors(found.values())["single_mu"].fit
    assert fit is not None
    flop = np.concatenate([s.flop("true").sum(axis=1) for s in found.values()])
    seconds = np.concatenate([s.rows["latency_s"] for s in found.values()])
    assert fit.n == len(flop) == len(synthetic.SIZES) + len(synthetic.FRAMES) + 10
    assert fit.value == pytest.approx((flop @ flop) / (flop @ seconds) / synthetic.PEAK)
    assert synthetic.MU / 1.1 < fit.value < synthetic.MU
    own = found["frames"].predictors["single_mu"].fit
    assert own is not None
    assert own.value == pytest.approx(synthetic.MU / 1.1)


def test_sweeps_that_were_not_measured_are_left_out(tmp_path: Path) -> None:
    table = synthetic.configurations()
    table.loc[table["experiment"] == "steps", "status"] = "out_of_memory"
    base = synthetic.root(tmp_path / "a", table[table["experiment"] != "frames"])
    assert list(sweeps.read_sweeps(base, "h200", CONFIGURATIONS)) == ["resolution"]
    base = synthetic.root(tmp_path / "b", table[table["experiment"] == "kernels"])
    with pytest.raises(UserError, match="none of the experiments resolution, frames, steps"):
        sweeps.read_sweeps(base, "h200", CONFIGURATIONS)
    with pytest.raises(UserError, match="one accelerator"):
        sweeps.fit_predictors([])
    kernels = sweeps.read_sweep(base, "h200", CONFIGURATIONS, "kernels")
    with pytest.raises(UserError, match="'kernels' is no sweep"):
        kernels.curve("true")


def test_shapes_of_equal_pixels_and_tiles_are_kept_and_what_ran_out_of_memory_is_not(tmp_path: Path) -> None:
    shapes = [synthetic.row("resolution", size, uuids=("GPU-D",)) for size in SHAPES]
    tiled = synthetic.row("resolution", (1984, 3520), uuids=("GPU-D",), n=1, intervention="vae-tiling+other")
    sweep = read(tmp_path, pd.concat([synthetic.configurations(), pd.DataFrame([*shapes, tiled])]))
    same = sweep.rows[sweep.rows["pixels"] == 480 * 832]
    assert list(same["height"]) == [416, 480, 624, 832]
    assert sweep.flop("true").loc[same.index].nunique().max() == 1
    assert sweep.rows["height"][sweep.tiled].tolist() == [1984]
    assert sweep.failed["height"].tolist() == [1984]
    assert len(sweep.curve("true"))  # one curve through all shapes


def test_the_local_exponent_is_a_slope_with_the_points_own_intervals() -> None:
    first, second = pd.Series({"t": 1.0, "t_ci95": 0.03}), pd.Series({"t": 8.0, "t_ci95": 0.32})
    slope, half = sweeps.local_exponent(first, second, "t", (10.0, 40.0))
    assert slope == pytest.approx(1.5)
    assert half == pytest.approx(0.05 / np.log(4))


def test_sizes_are_looked_up_and_doubles_refused(sweep: sweeps.Sweep, tmp_path: Path) -> None:
    row = sweep.at(480, 832)
    assert row is not None
    assert row["width"] == 832
    assert sweep.at(16, 16) is None
    table = synthetic.configurations()
    steps = read(tmp_path / "steps", table, "steps")
    assert steps.at(num_inference_steps=200)["height"] == 480  # type: ignore[index]
    assert steps.at(720, 1280, num_inference_steps=50)["latency_s_n"] == 1  # type: ignore[index]
    assert steps.at(720, 1280, 81, 20) is None
    with pytest.raises(UserError, match="2 rows with num_inference_steps 50"):
        steps.at(num_inference_steps=50)
    twice = read(tmp_path / "twice", pd.concat([table, table.assign(attention_kernel="flash")]))
    with pytest.raises(UserError, match="2 rows"):
        twice.at(480, 832)
    mixed = read(tmp_path / "mixed", pd.concat([table, table.assign(num_frames=41)]))
    with pytest.raises(UserError, match="41, 81"):
        mixed.fixed("num_frames")


def test_each_board_is_a_sweep_of_its_own_sizes(sweep: sweeps.Sweep) -> None:
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
    assert sweeps.board_means(row, "latency_s") == {}


def test_passes_of_one_board_are_averaged() -> None:
    row = pd.Series({"latency_s_pass_means": "2;5;4", "gpu_uuids": "A;B;A"})
    assert sweeps.board_means(row, "latency_s") == {"A": 3, "B": 5}
    assert sweeps.pass_means(pd.Series({"latency_s_pass_means": 2.5}), "latency_s") == [2.5]


def test_bars_show_the_passes_where_they_lie_further_apart_than_the_interval() -> None:
    rows = pd.DataFrame(
        {
            "t": [100.0, 100.0, 100.0],
            "t_ci95": [1.0, 3.0, np.nan],
            "t_pass_spread_percent": [4.0, 4.0, np.nan],
        }
    )
    assert sweeps.half_bars(rows, "t").tolist() == [2, 3, 0]


@pytest.mark.parametrize(
    ("count", "experiment", "frames"),
    [("study", "frames", 80), ("study", "resolution", 81), ("study", "steps", 81), ("true", "frames", 81)],
)
def test_the_studys_formula_gets_the_frames_that_the_study_lists(
    count: sweeps.Count, experiment: str, frames: int
) -> None:
    assert sweeps.counted_frames(count, experiment, 81) == frames


def test_with_the_listed_frames_the_printed_token_length_is_the_true_one(tmp_path: Path) -> None:
    frames = read(tmp_path / "frames", synthetic.configurations(), "frames")
    for _, row in frames.rows.iterrows():
        assert frames.work("study", row).tokens == frames.work("true", row).tokens
    first = frames.work("study", frames.rows.iloc[0]).flop["self_attention"]
    assert frames.curve("study").iloc[0]["self_attention"] == pytest.approx(first)
    sizes = read(tmp_path / "sizes", synthetic.configurations())
    for _, row in sizes.rows.iterrows():
        assert sizes.work("study", row).tokens > sizes.work("true", row).tokens
