"""Attention kernels compared: planted costs of a step, and rates and ratios that must come out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic_campaign as synthetic
from figure_checks import assert_legible
from t2v_energy.analysis import kernels, kernels_figure, style
from t2v_energy.config import load_model
from t2v_energy.errors import UserError
from t2v_energy.work import paper_work, true_work

CSV = Path("results/aggregated/h200/configurations.csv")
SIZES = ((256, 256), (384, 704), (480, 832), (720, 1280), (864, 1536))
MODEL = load_model(synthetic.REPOSITORY, "wan2.1-t2v-1.3b")
STEPS, GUIDANCE, LAYERS, WIDTH = 50, 2, 30, 1536
FLOP_PER_SQUARE = GUIDANCE * LAYERS * 4 * WIDTH  # QKᵀ and PV of one step: 2 · N · 4 ℓ² d
CONSTANT_S, LINEAR_S = 0.02, 1.1e-5
RATES = {"default": 560e12, "flash": 350e12}
REST_W = 690.0
POWER_W = {"default": 640.0, "flash": 600.0}  # of attention; all else runs at REST_W


def tokens(size: tuple[int, int]) -> int:
    return 21 * (size[0] // 16) * (size[1] // 16)


def step_s(size: tuple[int, int], way: str) -> float:
    ell = tokens(size)
    return CONSTANT_S + LINEAR_S * ell + FLOP_PER_SQUARE * ell**2 / RATES[way]


def step_J(size: tuple[int, int], way: str) -> float:
    shared_s = CONSTANT_S + LINEAR_S * tokens(size)
    return REST_W * shared_s + POWER_W[way] * (step_s(size, way) - shared_s)


def planted(size: tuple[int, int], way: str, **changes: Any) -> dict[str, object]:
    """A row whose steps take :func:`step_s` and :func:`step_J`, with 1 s at 400 W that comes once."""
    kernel = "cudnn" if way == "default" else "flash"
    row = synthetic.row("kernels", size, kernel=kernel, uuids=("GPU-A",))
    seconds = step_s(size, way)
    latency, joules = 1 + STEPS * seconds, 400 + STEPS * step_J(size, way)
    costs = {
        "latency_s": latency, "latency_s_ci95": 0.004 * latency, "latency_s_pass_means": str(latency),
        "gpu_energy_Wh": joules / 3600, "gpu_energy_Wh_ci95": 0.006 * joules / 3600,
        "gpu_energy_Wh_pass_means": str(joules / 3600), "step_time_s": seconds, "once_s": 1.0,
        "step_energy_J": step_J(size, way), "mean_power_W": joules / latency,
    }  # fmt: skip
    return row | costs | changes


def campaign(folder: Path, *rows: dict[str, object]) -> Path:
    return synthetic.root(folder, pd.DataFrame(list(rows)))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    rows = [planted(size, way) for size in reversed(SIZES) for way in RATES]
    return campaign(tmp_path / "root", *rows, synthetic.row("resolution", (256, 256)))


@pytest.fixture
def measured(base: Path) -> kernels.Kernels:
    found = kernels.read_kernels(base, "h200", CSV)
    assert found is not None
    return found


class TestRows:
    def test_sizes_are_paired_by_rising_tokens(self, measured: kernels.Kernels) -> None:
        assert measured.tokens.tolist() == [tokens(size) for size in SIZES]
        assert measured.forced["tokens"].tolist() == measured.tokens.tolist()
        assert measured.named == {"default": "cudnn", "flash": "flash"}

    def test_what_ran_by_itself_need_not_be_another_kernel(self, tmp_path: Path) -> None:
        """An older torch or GPU chooses flash by itself: the configuration's id says what was asked for."""
        rows = [
            planted(size, way, attention_kernel="flash")
            | {"configuration_id": f"m_{size[0]}x{size[1]}_81f_50s" + ("__flash" if way == "flash" else "")}
            for size in SIZES[:3]
            for way in RATES
        ]
        found = kernels.read_kernels(campaign(tmp_path / "root", *rows), "h200", CSV)
        assert found is not None
        assert found.named == {"default": "flash", "flash": "flash"}
        assert list(found.default["configuration_id"]) == [f"m_{h}x{w}_81f_50s" for h, w in SIZES[:3]]

    @pytest.mark.parametrize(
        ("configuration_id", "asked"),
        [
            ("m_1x1_5f_2s", "default"),
            ("m_1x1_5f_2s__flash", "flash"),
            ("m_1x1_5f_2s_pp001__math__vae-tiling", "math"),
            ("m_1x1_5f_2s__vae-tiling", "default"),
        ],
    )
    def test_what_an_id_asks_for(self, configuration_id: str, asked: str) -> None:
        assert kernels.asked_kernel(configuration_id) == asked

    def test_a_size_that_was_measured_one_way_is_left_out(self, tmp_path: Path) -> None:
        rows = [planted(size, way) for size in SIZES[:3] for way in RATES]
        failed = planted(SIZES[3], "flash", status="out_of_memory")
        base = campaign(tmp_path / "root", *rows, planted(SIZES[3], "default"), failed)
        found = kernels.read_kernels(base, "h200", CSV)
        assert found is not None
        assert len(found.default) == len(found.forced) == 3

    def test_a_campaign_without_the_experiment_has_empty_tables(self, tmp_path: Path) -> None:
        for number, row in enumerate((synthetic.row("resolution", (256, 256)), planted(SIZES[0], "default"))):
            found = kernels.read_kernels(campaign(tmp_path / str(number), row), "h200", CSV)
            assert found is None
        assert list(kernels.kernels_table(None).columns) == list(kernels.KERNELS_COLUMNS)
        assert len(kernels.kernels_table(None)) == len(kernels.fit_table(None)) == 0

    def test_a_missing_table_and_mixed_models(self, base: Path) -> None:
        with pytest.raises(UserError, match="no such file"):
            kernels.read_kernels(base, "h200", Path("nothing.csv"))
        table = pd.read_csv(base / CSV)
        table.loc[table.index[0], "model"] = "wan2.1-t2v-14b"
        table.to_csv(base / CSV, index=False)
        with pytest.raises(UserError, match="2 models"):
            kernels.read_kernels(base, "h200", CSV)


class TestFit:
    def test_flop_for_each_square_of_tokens(self, measured: kernels.Kernels) -> None:
        assert measured.attention_flop == pytest.approx(FLOP_PER_SQUARE, rel=1e-12)

    def test_planted_coefficients_and_rates_come_out(self, measured: kernels.Kernels) -> None:
        fit = kernels.fits(measured)["step_time_s"]
        assert (fit.constant, fit.linear) == pytest.approx((CONSTANT_S, LINEAR_S), rel=1e-6)
        assert fit.n == 10
        assert fit.largest_residual_percent == pytest.approx(0, abs=1e-8)
        assert fit.r2 == pytest.approx(1)
        for way, rate in kernels.rates(measured, fit).items():
            assert rate.value == pytest.approx(RATES[way], rel=1e-6)
            assert rate.low <= rate.value <= rate.high
        assert kernels.rate_ratio(fit).value == pytest.approx(350 / 560, rel=1e-6)
        energy = kernels.fits(measured)["step_energy_J"]
        for way, joules in energy.quadratic.items():
            assert joules == pytest.approx(POWER_W[way] * FLOP_PER_SQUARE / RATES[way], rel=1e-6)

    def test_intervals_hold_the_truth_as_often_as_they_say(self) -> None:
        """Relative errors of 0.3 %: the intervals of c₂ and of the ratio of rates must hold 95 %."""
        random = np.random.default_rng(1)
        ell = np.array([tokens(size) for size in SIZES], dtype=float)
        truth = {way: np.array([step_s(size, way) for size in SIZES]) for way in RATES}
        held = dict.fromkeys(("constant", "linear", "default", "flash", "ratio"), 0)
        repeats = 400
        for _ in range(repeats):
            noisy = {way: y * (1 + 0.003 * random.standard_normal(y.size)) for way, y in truth.items()}
            fit = kernels.fit_jointly(ell, noisy)
            expected = {"constant": CONSTANT_S, "linear": LINEAR_S}
            expected |= {way: FLOP_PER_SQUARE / RATES[way] for way in RATES}
            values = {"constant": fit.constant, "linear": fit.linear, **fit.quadratic}
            for name, value in values.items():
                held[name] += abs(value - expected[name]) <= fit.half_widths[name]
            ratio = kernels.rate_ratio(fit)
            held["ratio"] += ratio.low <= 350 / 560 <= ratio.high
        for name, count in held.items():
            assert 0.92 <= count / repeats <= 0.98, name

    def test_small_sizes_count_as_much_as_large_ones(self) -> None:
        """A tenth more on the smallest size must move c₀ and c₁, although it is milliseconds."""
        ell = np.array([tokens(size) for size in SIZES], dtype=float)
        series = {way: np.array([step_s(size, way) for size in SIZES]) for way in RATES}
        plain = kernels.fit_jointly(ell, series)
        moved = kernels.fit_jointly(ell, {way: y * [1.1, 1, 1, 1, 1] for way, y in series.items()})
        assert moved.constant > 1.3 * plain.constant

    @pytest.mark.parametrize(
        ("ell", "y"), [([1.0, 2.0], [1.0, 2.0]), ([1.0, 1.0, 2.0], [1.0, 1.0, 2.0]), ([1, 2, 3], [1, 0, 3])]
    )
    def test_what_cannot_be_fitted(self, ell: list[float], y: list[float]) -> None:
        with pytest.raises(UserError, match="needs three sizes"):
            kernels.fit_jointly(ell, {"default": y, "flash": y})

    def test_two_sizes_have_ratios_and_no_fit(self, tmp_path: Path) -> None:
        rows = [planted(size, way) for size in SIZES[:2] for way in RATES]
        found = kernels.read_kernels(campaign(tmp_path / "root", *rows), "h200", CSV)
        assert found is not None
        assert kernels.fits(found) == {}
        table = kernels.kernels_table(found)
        assert set(table["quantity"]) == {*kernels.COMPARED, *kernels.EFFICIENCIES}
        assert table["fitted_ratio"].isna().all()
        assert set(kernels.fit_table(found)["parameter"]) == set(kernels.EFFICIENCIES)
        assert kernels_figure.figure_kernels(found).axes


class TestTable:
    def at(self, measured: kernels.Kernels, size: tuple[int, int], quantity: str) -> pd.Series:
        table = kernels.kernels_table(measured)
        of_size = table[(table["height"] == size[0]) & (table["width"] == size[1])]
        return of_size.set_index("quantity").loc[quantity]

    def test_ratios_and_their_intervals(self, measured: kernels.Kernels) -> None:
        for size in SIZES:
            row = self.at(measured, size, "latency_s")
            expected = (1 + STEPS * step_s(size, "flash")) / (1 + STEPS * step_s(size, "default"))
            assert row["ratio"] == pytest.approx(expected)
            assert row["ratio_ci95"] == pytest.approx(expected * np.hypot(0.004, 0.004))
            assert row["fitted_ratio"] == pytest.approx(expected, rel=1e-6)
            assert (row["same_board"], row["kind"], row["unit"]) == ("yes", "measured", "s")
            energy = self.at(measured, size, "gpu_energy_Wh")
            assert energy["fitted_ratio"] == pytest.approx(energy["ratio"], rel=1e-6)
            assert energy["ratio_ci95"] == pytest.approx(energy["ratio"] * np.hypot(0.006, 0.006))
            assert self.at(measured, size, "once_s")["ratio"] == pytest.approx(1)

    def test_step_times_have_the_interval_of_their_standard_error(self, measured: kernels.Kernels) -> None:
        row = self.at(measured, SIZES[2], "step_time_s")
        assert row["default_ci95"] == pytest.approx(1.96 * 0.001 * step_s(SIZES[2], "default"))

    def test_the_rate_at_each_size_is_the_planted_one(self, measured: kernels.Kernels) -> None:
        for size in SIZES[1:]:
            row = self.at(measured, size, "attention_rate")
            assert (row["default"], row["flash"]) == pytest.approx((560, 350), rel=1e-5)
            assert (row["unit"], row["kind"]) == ("TFLOP/s", "modelled")

    def test_efficiencies_by_both_counts(self, measured: kernels.Kernels) -> None:
        size = SIZES[3]
        latency = 1 + STEPS * step_s(size, "flash")
        for name, work in (("mu_study", paper_work), ("mu_true", lambda *s: true_work(MODEL, *s))):
            row = self.at(measured, size, name)
            expected = work(*size, 81, STEPS).total_flop / latency / 989e12
            assert row["flash"] == pytest.approx(expected)
            assert row["flash_ci95"] == pytest.approx(0.004 * expected)
            assert row["ratio"] == pytest.approx(1 / self.at(measured, size, "latency_s")["ratio"])
            assert row["kind"] == "modelled"

    def test_boards_that_differ_are_told(self, tmp_path: Path) -> None:
        rows = [
            planted(size, way, gpu_uuids="GPU-A" if way == "default" else "GPU-B")
            for size in SIZES[:3]
            for way in RATES
        ]
        found = kernels.read_kernels(campaign(tmp_path / "root", *rows), "h200", CSV)
        table = kernels.kernels_table(found)
        assert set(table["same_board"]) == {"no"}
        assert set(table["gpu_uuid"]) == {"GPU-A;GPU-B"}

    def test_without_a_counter_there_are_no_energies(self, tmp_path: Path) -> None:
        none = {"gpu_energy_Wh": np.nan, "gpu_energy_Wh_ci95": np.nan, "step_energy_J": np.nan}
        rows = [
            planted(size, way, **none, mean_power_W=np.nan, gpu_energy_Wh_pass_means="")
            for size in SIZES
            for way in RATES
        ]
        found = kernels.read_kernels(campaign(tmp_path / "root", *rows), "h200", CSV)
        assert found is not None
        quantities = set(kernels.kernels_table(found)["quantity"])
        assert quantities == {"latency_s", "step_time_s", "once_s", "attention_rate", *kernels.EFFICIENCIES}
        assert len(kernels_figure.figure_kernels(found).axes) == 1
        assert not kernels.fit_table(found)["parameter"].str.startswith("step_energy").any()


class TestEfficiencyFits:
    def test_of_the_shared_campaign(self, tmp_path: Path) -> None:
        base = synthetic.root(tmp_path / "root", synthetic.configurations())
        measured = kernels.read_kernels(base, "h200", CSV)
        table = kernels.fit_table(measured).set_index(["parameter", "kernel"])
        default, flash = (table.loc["mu_true", way] for way in ("default", "flash"))
        assert default["value"] == pytest.approx(synthetic.MU, rel=1e-6)
        assert flash["value"] == pytest.approx(synthetic.MU / synthetic.FLASH_SLOWER, rel=1e-6)
        assert flash["n"] == len(synthetic.KERNEL_SIZES)
        # the printed formula counts more than runs, so the same seconds are a larger share of the peak
        assert table.loc["mu_study", "default"]["value"] > 1.3 * default["value"]

    def test_every_line_has_its_unit_and_kind(self, measured: kernels.Kernels) -> None:
        table = kernels.fit_table(measured)
        assert tuple(table.columns) == kernels.FIT_COLUMNS
        assert set(table["kind"]) == {"modelled"}
        assert not table.duplicated(["parameter", "kernel"]).any()
        by_name = table.set_index(["parameter", "kernel"])
        assert by_name.loc["attention_rate", "flash"]["value"] == pytest.approx(350)
        assert by_name.loc["attention_peak_share", "default"]["value"] == pytest.approx(560 / 989)
        assert by_name.loc["step_time_s.c2", "flash"]["unit"] == "s/token²"


def test_the_figure_is_the_same_bytes_each_time(measured: kernels.Kernels, tmp_path: Path) -> None:
    first = style.save(kernels_figure.figure_kernels(measured), tmp_path / "a")
    again = style.save(kernels_figure.figure_kernels(measured), tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]


def test_the_figure_shows_what_the_table_says(measured: kernels.Kernels) -> None:
    figure = kernels_figure.figure_kernels(measured)
    table = kernels.kernels_table(measured)
    assert_legible(figure)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "Latency, flash / cuDNN",
        "GPU energy, flash / cuDNN",
    ]
    for axes, quantity in zip(figure.axes, ("latency_s", "gpu_energy_Wh"), strict=True):
        points = next(line for line in axes.lines if line.get_linestyle() == "None")
        rows = table[table["quantity"] == quantity]
        assert np.allclose(1e3 * points.get_xdata().astype(float), rows["tokens"])
        assert np.allclose(points.get_ydata(), rows["ratio"])
        curve = next(line for line in axes.lines if len(line.get_xdata()) == kernels_figure.CURVE_POINTS)
        assert np.allclose(
            np.interp(rows["tokens"] / 1e3, *curve.get_data()), rows["fitted_ratio"], rtol=1e-3
        )


def test_where_nothing_can_be_compared_the_figure_says_so(tmp_path: Path) -> None:
    figure = kernels_figure.figure_nothing_to_compare()
    assert "both" in figure.texts[0].get_text()
    assert all(path.stat().st_size > 0 for path in style.save(figure, tmp_path / "kernels"))
