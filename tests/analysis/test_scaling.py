"""Scaling laws: planted exponents, regimes, boards and doublings are found."""

from __future__ import annotations

from math import exp, hypot, isnan, log, sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_sweeps as synthetic
from figure_checks import assert_legible
from scipy.stats import t as student_t
from t2v_energy.analysis import scaling, scaling_figure, style
from t2v_energy.analysis.tables import write_csvs
from t2v_energy.errors import UserError
from t2v_energy.work import true_work, wan


def read(folder: Path, table: pd.DataFrame) -> scaling.Campaign:
    return scaling.read_campaign(synthetic.root(folder / "root", table), "h200", synthetic.CONFIGURATIONS)


@pytest.fixture
def campaign(tmp_path: Path) -> scaling.Campaign:
    return read(tmp_path, synthetic.configurations())


def quantile(freedom: int) -> float:
    return float(student_t.ppf(0.975, freedom))


# --- reading ------------------------------------------------------------------------------------------------


def test_rows_get_the_tokens_that_the_denoiser_sees(campaign: scaling.Campaign) -> None:
    rows = campaign.rows
    expected = [
        synthetic.tokens(h, w, t)
        for h, w, t in zip(rows["height"], rows["width"], rows["num_frames"], strict=True)
    ]
    assert list(rows["tokens"]) == expected
    assert list(rows["whole_tiles"]) == [n % 128 == 0 for n in expected]
    assert campaign.of("frames")["tokens"].is_monotonic_increasing


def test_only_measured_rows_with_the_same_denoiser_are_read(tmp_path: Path) -> None:
    table = synthetic.configurations()
    changed = pd.DataFrame(
        [
            dict(synthetic.row("resolution", 1984, 3520), intervention="vae-tiling"),
            dict(synthetic.row("resolution", 1088, 1920), intervention="token-merging"),
            dict(synthetic.row("resolution", 1440, 2560), status="out_of_memory"),
            synthetic.row("validation", 480, 832),
        ]
    )
    rows = read(tmp_path, pd.concat([table, changed])).rows
    assert len(rows) == len(table) + 1
    assert (rows["height"] == 1984).sum() == 1


def test_a_missing_table_an_empty_one_and_two_models_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage 3"):
        scaling.read_campaign(tmp_path, "h200", Path("nowhere.csv"))
    table = synthetic.configurations()
    with pytest.raises(UserError, match="0 measured rows of 0 models"):
        read(tmp_path / "empty", table.assign(status="out_of_memory"))
    mixed = table.assign(model=["wan2.1-t2v-14b", *table["model"][1:]])
    with pytest.raises(UserError, match="of 2 models"):
        read(tmp_path / "mixed", mixed)


# --- passes and boards --------------------------------------------------------------------------------------


def test_boards_that_differ_by_one_factor_leave_no_rest(campaign: scaling.Campaign) -> None:
    scatter = campaign.scatter["latency_s"]
    assert scatter.rest == pytest.approx(0, abs=1e-12)
    # Configurations that two experiments share are one: the sweeps' 50-step video of 720×1280×81 is its own
    # protocol in `steps`, and the sizes of `kernels` are in `resolution` too.
    keys = ["label", "protocol", "attention_kernel"]
    rows = campaign.rows
    cells = len(rows[keys].drop_duplicates())
    assert cells < len(rows)
    assert scatter.rest_df == 2 * len(rows) - cells - 1
    assert scatter.board == pytest.approx(log(synthetic.SLOWER) / sqrt(2))
    assert scatter.board_df == 1


def test_a_planted_scatter_of_passes_is_found() -> None:
    rows = pd.DataFrame(
        [
            dict(synthetic.row("resolution", 480, 832), label="a", latency_s_pass_means="1.0;1.1"),
            dict(synthetic.row("resolution", 512, 512), label="b", latency_s_pass_means="1.0;1.0"),
        ]
    )
    scatter = scaling.pass_scatter(rows, "latency_s")
    # two-way residuals are ± a quarter of the interaction ln 1.1, with one degree of freedom
    assert scatter.rest_df == 1
    assert scatter.rest == pytest.approx(log(1.1) / 2)
    assert scatter.board == pytest.approx(log(1.1) / 2 / sqrt(2))


def test_boards_compare_only_where_a_configuration_links_them() -> None:
    rows = pd.DataFrame(
        [
            dict(
                synthetic.row("frames", 64, 64, boards=("A", "B")), label="a", latency_s_pass_means="1;1.02"
            ),
            dict(
                synthetic.row("frames", 64, 64, boards=("C", "D")), label="b", latency_s_pass_means="7;7.14"
            ),
        ]
    )
    scatter = scaling.pass_scatter(rows, "latency_s")
    assert scatter.board_df == 2
    assert scatter.board == pytest.approx(log(1.02) / sqrt(2))
    assert scatter.rest_df == 0
    assert isnan(scatter.rest)


def test_passes_measured_once_or_on_unknown_boards_say_nothing() -> None:
    once = pd.DataFrame([dict(synthetic.row("frames", 64, 64, boards=("A",)), label="a")])
    assert scaling.pass_scatter(once, "latency_s").rest_df == 0
    two = dict(synthetic.row("frames", 64, 64), label="a")
    for changed in ({"gpu_uuids": ""}, {"latency_s_pass_means": "nan;nan"}, {"latency_s_pass_means": ""}):
        unknown = pd.DataFrame([two | changed])
        assert scaling.pass_scatter(unknown, "latency_s").rest_df == 0


@pytest.mark.parametrize(("flags", "freedom"), [("", 1), (np.nan, 1), ("flag:step_sem", 0)])
def test_a_flagged_row_says_nothing_of_the_others_passes(flags: object, freedom: int) -> None:
    rows = pd.DataFrame(
        [
            dict(synthetic.row("frames", 64, 64 * k), label=str(k), latency_s_pass_means=means)
            for k, means in ((1, "1;1.02"), (2, "1;1.5"))
        ]
    ).assign(flags=["", flags])
    assert scaling.pass_scatter(rows, "latency_s").rest_df == freedom


def test_the_boards_part_vanishes_between_rows_of_the_same_boards() -> None:
    scatter = scaling.Scatter(rest=0.01, rest_df=10, board=0.02, board_df=3)
    alike = [pd.Series(synthetic.row("frames", 64, 64)) for _ in range(2)]
    rest = quantile(10) * 0.01 * sqrt(1 / 2 + 1 / 2)
    assert scatter.half_width(*alike) == pytest.approx(rest)
    one = pd.Series(synthetic.row("frames", 64, 64, boards=("GPU-A",)))
    other = pd.Series(synthetic.row("frames", 64, 64, boards=("GPU-C",)))
    rest, board = quantile(10) * 0.01 * sqrt(2), quantile(3) * 0.02 * sqrt(2)
    assert scatter.half_width(one, other) == pytest.approx(hypot(rest, board))
    unknown = one.drop("gpu_uuids").combine_first(pd.Series({"gpu_uuids": ""}))
    assert scatter.half_width(one, unknown) == pytest.approx(hypot(rest, board))


def test_an_interval_names_its_parts() -> None:
    rows = [pd.Series(synthetic.row("frames", 64, 64)) for _ in range(2)]
    none = {q: scaling.Scatter() for q in scaling.VIDEO_QUANTITIES}
    half, parts = scaling.ratio_half_width(rows[0], rows[1], "latency_s", none)
    assert (half, parts) == (pytest.approx(0.001 * sqrt(2)), "repetition")
    known = {q: scaling.Scatter(0.01, 10, 0.02, 3) for q in scaling.VIDEO_QUANTITIES}
    wider, parts = scaling.ratio_half_width(rows[0], rows[1], "latency_s", known)
    assert parts == "repetition, passes, boards"
    assert wider == pytest.approx(hypot(half, quantile(10) * 0.01))
    single = rows[1].drop("latency_s_ci95").combine_first(pd.Series({"latency_s_ci95": np.nan}))
    assert isnan(scaling.ratio_half_width(rows[0], single, "latency_s", none)[0])
    covered, _ = scaling.ratio_half_width(rows[0], single, "latency_s", known)
    assert covered == pytest.approx(hypot(0.001, quantile(10) * 0.01))


# --- exponents and polynomials ------------------------------------------------------------------------------


def test_an_exact_power_law_is_found() -> None:
    x = np.array([1.0, 2.0, 5.0, 10.0])
    fit = scaling.log_slope(x, 3 * x**1.7)
    assert fit.slope == pytest.approx(1.7)
    assert fit.high - fit.low == pytest.approx(0, abs=1e-9)


def test_the_exponents_interval_equals_a_hand_computed_regression() -> None:
    # in logs: u = 0, 1, 2; v = 0, 2, 2: slope 1; residuals −1/3, 2/3, −1/3; s² = 2/3; error sqrt(2/3 / 2)
    fit = scaling.log_slope(np.exp([0.0, 1.0, 2.0]), np.exp([0.0, 2.0, 2.0]))
    assert fit.slope == pytest.approx(1)
    assert fit.high - fit.slope == pytest.approx(quantile(1) * sqrt(1 / 3))
    assert isnan(scaling.log_slope([1.0, 2.0], [1.0, 4.0]).low)


@pytest.mark.parametrize(("x", "y"), [([2.0, 2.0], [1.0, 2.0]), ([1.0, 2.0], [1.0, -2.0])])
def test_an_exponent_that_cannot_be_is_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(UserError, match="two different sizes"):
        scaling.log_slope(x, y)


def test_a_polynomial_weighs_relative_errors() -> None:
    x = np.array([1.0, 10.0, 100.0, 1000.0, 10000.0])
    exact = scaling.fit_polynomial(x, 4 + 3 * x + 2e-3 * x**2, 2)
    np.testing.assert_allclose(exact.coefficients, (4, 3, 2e-3), rtol=1e-8)
    # of one line through points 10 % too high and 10 % too low at one x, both err by about as many percent
    both = scaling.fit_polynomial([1.0, 1.0, 1e6, 1e6], [0.9, 1.1, 0.9e6, 1.1e6], 1)
    np.testing.assert_allclose(both.residual_percent[:2], both.residual_percent[2:], rtol=1e-3)


def test_aic_is_corrected_for_small_samples() -> None:
    assert scaling.aicc(1.0, 10, 2) == pytest.approx(10 * log(0.1) + 6 + 2 * 3 * 4 / 6)
    assert isnan(scaling.aicc(1.0, 4, 2))
    assert isnan(scaling.aicc(0.0, 10, 2))


@pytest.mark.parametrize(("curvature", "better"), [(0.0, "linear"), (0.5, "quadratic")])
def test_aic_tells_a_line_from_a_parabola(curvature: float, better: str) -> None:
    x = np.arange(1.0, 13.0)
    noise = 1 + 0.01 * np.array([1, -1, -1, 1, 1, -1, 1, -1, -1, 1, -1, 1])
    y = (2 + 3 * x + curvature * x**2) * noise
    aic = {name: scaling.fit_polynomial(x, y, d).aic for name, d in (("linear", 1), ("quadratic", 2))}
    assert min(aic, key=lambda name: aic[name]) == better


def test_too_few_sizes_for_a_polynomial_are_refused() -> None:
    with pytest.raises(UserError, match="needs 3 sizes"):
        scaling.fit_polynomial([1.0, 2.0, 2.0], [1.0, 2.0, 2.0], 2)


def test_the_table_has_global_local_and_empty_cells(campaign: scaling.Campaign) -> None:
    table = scaling.scaling_table(campaign)
    assert list(table.columns) == list(scaling.SCALING_COLUMNS)
    assert list(table.columns[:11]) == [
        "set", "quantity", "x", "exponent", "exponent_ci95_low", "exponent_ci95_high", "range",
        "r2_linear", "r2_quadratic", "aic_linear", "aic_quadratic",
    ]  # fmt: skip
    whole = table[table["kind"] == "global"]
    assert {(s, x) for s, x in zip(whole["set"], whole["x"], strict=True)} == {
        ("resolution", "pixels"), ("resolution", "tokens"), ("frames", "num_frames"), ("frames", "tokens"),
        ("steps", "num_inference_steps"),
    }  # fmt: skip
    assert set(whole[whole["set"] == "steps"]["range"]) == {"global, 480×832", "global, 720×1280"}
    pairs = table[table["kind"] == "pair"]
    assert pairs[["r2_linear", "aic_quadratic"]].isna().all(axis=None)
    assert (pairs["x_to"] / pairs["x_from"]).between(*scaling.PAIR_RATIOS).all()
    assert (pairs["exponent_ci95_low"] < pairs["exponent"]).all()
    assert (pairs["interval_of"] == "repetition, passes, boards").all()
    tokens = pairs[pairs["x"] == "tokens"]
    same = (tokens["x_from"] % synthetic.TILE == 0) == (tokens["x_to"] % synthetic.TILE == 0)
    assert list(tokens["same_tiles"]) == list(same)
    windows = table[table["kind"] == "window"]
    assert len(windows)
    assert (windows["n"] >= scaling.MIN_FIT_POINTS).all()


def test_sizes_of_equal_tokens_make_one_point_of_a_pair(campaign: scaling.Campaign) -> None:
    pairs = scaling.scaling_table(campaign).query("kind == 'pair' and set == 'resolution' and x == 'pixels'")
    ends = {end for text in pairs["range"] for end in text.split(" to ")}
    assert not {"480×832", "832×480"} <= ends
    assert (pairs["x_from"] < pairs["x_to"]).all()


def test_pairs_have_the_planted_local_exponent(campaign: scaling.Campaign) -> None:
    table = scaling.scaling_table(campaign).query("kind == 'pair' and x == 'tokens'")
    row = table[(table["range"] == "480×832 to 720×1280") & (table["quantity"] == "step_time_s")].iloc[0]
    n = [synthetic.tokens(*size, 81) for size in ((480, 832), (720, 1280))]
    expected = log(synthetic.step_s(n[1]) / synthetic.step_s(n[0])) / log(n[1] / n[0])
    assert row["exponent"] == pytest.approx(expected)


# --- regimes ------------------------------------------------------------------------------------------------


def test_planted_regimes_are_recovered(campaign: scaling.Campaign) -> None:
    planted = (synthetic.CONSTANT_S, synthetic.LINEAR_S, synthetic.QUADRATIC_S, synthetic.RAGGED_S)
    for name in ("resolution", "frames", "resolution+frames"):
        regimes = scaling.find_regimes(scaling.all_regimes(campaign), name, "step_time_s")
        assert regimes is not None
        assert regimes.model == "tiles"
        np.testing.assert_allclose(regimes.fit.coefficients, planted, rtol=1e-5)


def test_noise_widens_the_intervals_to_hold_the_truth() -> None:
    rng = np.random.default_rng(1)
    n = np.geomspace(5e3, 2e5, 30).round()
    covered = []
    for _ in range(200):
        cost = (0.02 + 1.6e-5 * n + 6.5e-10 * n**2) * (1 + 0.01 * rng.standard_normal(n.size))
        fit = scaling.fit_regimes(n, cost, ragged=False)
        covered.append(fit.low[2] <= 6.5e-10 <= fit.high[2])
    assert 0.9 <= np.mean(covered) <= 0.99


def test_a_part_that_is_not_there_is_zero_and_never_negative() -> None:
    n = np.array([1e3, 2e3, 4e3, 8e3, 16e3])
    fit = scaling.fit_regimes(n, 1e-5 * n - 1e-4, ragged=False)
    assert fit.coefficients[0] == 0
    assert (fit.coefficients >= 0).all()
    assert isnan(fit.low[0])
    assert fit.tokens_at(1.9) > 0


def test_too_few_token_counts_are_refused() -> None:
    with pytest.raises(UserError, match="4 different token counts"):
        scaling.fit_regimes([1.0, 2.0, 3.0, 3.0], [1.0, 2.0, 3.0, 3.0])


def test_the_exponent_is_the_derivative_and_reaches_what_was_asked() -> None:
    n = np.arange(1000, 60_000, 1999)
    cost = [synthetic.step_s(int(k)) for k in n]
    fit = scaling.fit_regimes(n, cost, ragged=False)
    h = 1e-4
    for at in (5e3, 5e4):
        slope = log(float(fit.cost(at * exp(h), False) / fit.cost(at * exp(-h), False))) / (2 * h)
        assert float(fit.exponent(at)) == pytest.approx(slope, rel=1e-6)
    assert float(fit.exponent(fit.tokens_at(1.9))) == pytest.approx(1.9)


def test_counted_flop_of_a_step_are_a_parabola_in_tokens() -> None:
    model = synthetic.MODEL
    flop = scaling.step_flop(model)
    transformer = model.components["transformer"].config
    assert flop.quadratic == model.passes_per_step * transformer["num_layers"] * 4 * wan.width(transformer)
    n = synthetic.tokens(720, 1280, 81)
    work = true_work(model, 720, 1280, 81, 1)
    assert flop.constant + flop.linear * n + flop.quadratic * n**2 == pytest.approx(
        work.flop_by_stage["denoiser"], rel=1e-12
    )
    assert float(flop.exponent(n)) == pytest.approx(
        1 + flop.quadratic_share(n) - flop.constant / work.flop_by_stage["denoiser"]
    )


def test_implied_rates_are_flop_over_time(campaign: scaling.Campaign) -> None:
    table = scaling.regime_fits(campaign)
    flop = scaling.step_flop(campaign.model)
    row = table[
        (table["set"] == "resolution")
        & (table["quantity"] == "step_time_s")
        & (table["model"] == "tiles")
        & (table["coefficient"] == "quadratic")
    ].iloc[0]
    assert row["rate_TFLOP_per_s"] == pytest.approx(flop.quadratic / synthetic.QUADRATIC_S / 1e12, rel=1e-5)
    kernels = table[(table["set"] == "kernels") & (table["model"] == "smooth")]
    rates = kernels[(kernels["coefficient"] == "quadratic") & kernels["rate_TFLOP_per_s"].notna()]
    rate = rates.set_index("attention_kernel")["rate_TFLOP_per_s"]
    assert rate["cudnn"] / rate["flash"] == pytest.approx(synthetic.FLASH, rel=0.01)
    assert table[table["quantity"] != "step_time_s"]["rate_TFLOP_per_s"].isna().all()


def test_shares_sum_to_one(campaign: scaling.Campaign) -> None:
    table = scaling.regime_table(campaign)
    assert list(table.columns) == list(scaling.REGIME_COLUMNS)
    shares = table[["constant_share", "linear_share", "quadratic_share"]]
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    np.testing.assert_allclose(
        table["fitted"] / table["measured"] - 1, table["residual_percent"] / 100, atol=1e-12
    )


# --- doubling -----------------------------------------------------------------------------------------------


def test_every_exact_doubling_is_found_and_no_other(campaign: scaling.Campaign) -> None:
    table = scaling.doubling_table(campaign)
    table = table[table["quantity"] == "latency_s"]
    counts = table["dimension"].value_counts().to_dict()
    assert counts["height and width"] == 2  # 256×256 to 512×512, 432×768 to 864×1536
    assert counts["steps"] == 6  # 1→2, 5→10, 10→20 at two sizes
    latent = {(t - 1) // 4 + 1 for t in synthetic.FRAMES}
    assert counts["latent frames"] == sum(2 * n in latent for n in latent)


def test_a_doublings_ratios_are_the_planted_ones(campaign: scaling.Campaign) -> None:
    table = scaling.doubling_table(campaign)
    row = table[(table["from"] == "256×256×81, S = 50") & (table["quantity"] == "latency_s")].iloc[0]
    times = [synthetic.ONCE_S + 50 * synthetic.step_s(synthetic.tokens(s, s, 81)) for s in (256, 512)]
    assert row["ratio"] == pytest.approx(times[1] / times[0])
    assert (row["ratio_study"], row["tokens_factor"]) == (16, 4)
    flop = [true_work(campaign.model, s, s, 81, 50).total_flop for s in (256, 512)]
    assert row["ratio_flop"] == pytest.approx(flop[1] / flop[0])
    assert row["ratio_ci95_low"] < row["ratio"] < row["ratio_ci95_high"]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((256, 256, 81, 50), (512, 256, 81, 50), "height"),
        ((256, 256, 81, 50), (256, 512, 81, 50), "width"),
        ((256, 512, 81, 50), (512, 512, 81, 50), "height"),
        ((256, 256, 81, 50), (128, 1024, 81, 50), "area"),
        ((256, 256, 37, 50), (256, 256, 77, 50), "latent frames"),
        ((256, 256, 81, 5), (256, 256, 81, 10), "steps"),
        ((256, 256, 81, 50), (256, 256, 81, 50), None),
        ((256, 256, 37, 50), (512, 256, 77, 50), None),
        ((512, 512, 81, 50), (256, 256, 81, 50), None),
    ],
)
def test_a_doubled_dimension_is_named(
    first: tuple[int, ...], second: tuple[int, ...], expected: str | None
) -> None:
    rows = [
        pd.Series(
            {
                "height": h, "width": w, "latent_frames": (t - 1) // 4 + 1, "num_inference_steps": s,
                "tokens": synthetic.tokens(h, w, t),
            }
        )
        for h, w, t, s in (first, second)
    ]  # fmt: skip
    assert scaling.doubled_dimension(*rows) == expected


def test_the_studys_ratios() -> None:
    found = {d: scaling.study_ratio(d) for d in ("height", "latent frames", "height and width", "steps")}
    assert found == {"height": 4, "latent frames": 4, "height and width": 16, "steps": 2}


# --- what is missing ----------------------------------------------------------------------------------------


def test_without_a_counter_only_times_are_given(tmp_path: Path) -> None:
    table = synthetic.configurations().assign(
        gpu_energy_Wh=np.nan, gpu_energy_Wh_ci95=np.nan, step_energy_J=np.nan, gpu_energy_Wh_pass_means=""
    )
    campaign = read(tmp_path, table)
    for built in (
        scaling.scaling_table(campaign),
        scaling.regime_table(campaign),
        scaling.doubling_table(campaign),
    ):
        assert set(built["quantity"]) <= {"latency_s", "step_time_s"}
        assert len(built)


def test_a_single_row_gives_empty_tables_and_an_empty_figure(tmp_path: Path) -> None:
    campaign = read(tmp_path, pd.DataFrame([synthetic.row("resolution", 480, 832)]))
    exponents = scaling.scaling_table(campaign)
    tables = (exponents, scaling.regime_fits(campaign), scaling.regime_table(campaign))
    assert all(table.empty for table in (*tables, scaling.doubling_table(campaign)))
    scaling_figure.figure_exponents(campaign, exponents)


def test_the_figure_has_three_panels_and_the_same_bytes_twice(
    campaign: scaling.Campaign, tmp_path: Path
) -> None:
    table = scaling.scaling_table(campaign)
    files = []
    for name in ("a", "b"):
        figure = scaling_figure.figure_exponents(campaign, table)
        files.append(style.save(figure, tmp_path / name))
    assert_legible(figure)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "Local exponent of latency over tokens", "Part of latency (%)", "Residual (%)",
    ]  # fmt: skip
    for first, second in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_tables_are_the_same_bytes_twice(campaign: scaling.Campaign, tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        built = {"scaling": scaling.scaling_table(campaign), "doubling": scaling.doubling_table(campaign)}
        texts.append([path.read_bytes() for path in write_csvs(built, tmp_path / name)])
    assert texts[0] == texts[1]
