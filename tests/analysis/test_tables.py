"""Table 3 against values computed by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import synthetic_campaign as synthetic
from t2v_energy.analysis import sweep as sweeps
from t2v_energy.analysis import tables
from t2v_energy.errors import UserError
from t2v_energy.work import paper

CONFIGURATIONS = Path("results/aggregated/h200/configurations.csv")


def read(folder: Path, table: pd.DataFrame) -> dict[str, sweeps.Sweep]:
    return sweeps.read_sweeps(synthetic.root(folder / "root", table), "h200", CONFIGURATIONS)


def table3(found: dict[str, sweeps.Sweep]) -> pd.DataFrame:
    return tables.table3(found, sweeps.fit_predictors(found.values()))


@pytest.fixture
def three(tmp_path: Path) -> dict[str, sweeps.Sweep]:
    return read(tmp_path, synthetic.configurations())


def test_the_error_is_the_mean_of_absolute_percentages() -> None:
    # −10 % and +20 %: a mean of signed errors would be 5 %
    assert tables.mape_percent([90.0, 240.0], [100.0, 200.0]) == pytest.approx(15)


@pytest.mark.parametrize(("predicted", "measured"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_errors_that_make_no_sense_are_refused(predicted: list[float], measured: list[float]) -> None:
    with pytest.raises(UserError):
        tables.mape_percent(predicted, measured)


def test_table_3_equals_hand_computed_errors(three: dict[str, sweeps.Sweep]) -> None:
    table = table3(three)
    assert tuple(table.columns) == tables.TABLE3_COLUMNS
    errors = table.set_index(["set", "predictor", "quantity"])["mape_percent"]
    counts = table.groupby("set")["n"].unique().map(list).to_dict()
    assert counts == {
        "resolution": [len(synthetic.SIZES)],
        "frames": [len(synthetic.FRAMES)],
        "steps": [sum(map(len, synthetic.STEPS.values()))],
    }
    for name, sweep in three.items():
        assert errors[name, "single_mu", "latency_s"] == pytest.approx(0, abs=1e-6)
        # predicted at 700 W, planted at 650 W: 700/650 − 1 at every point
        assert errors[name, "single_mu", "gpu_energy_Wh"] == pytest.approx(100 * 50 / 650)
        by_hand = []
        for (_, row), flop in zip(sweep.rows.iterrows(), sweep.flop("study").sum(axis=1), strict=True):
            by_hand.append(100 * abs(flop / (0.456 * 989e12) - row["latency_s"]) / row["latency_s"])
        assert errors[name, "paper", "latency_s"] == pytest.approx(sum(by_hand) / len(by_hand))
    assert (paper.EFFICIENCY, paper.MAX_POWER_W) == (0.456, 700)


def test_one_efficiency_serves_every_set(tmp_path: Path) -> None:
    table = synthetic.configurations()
    times = table["experiment"].map({"resolution": 1.0, "frames": 1.2, "steps": 0.9}).fillna(1)
    table["latency_s"] *= times
    three = read(tmp_path, table)
    errors = table3(three).set_index(["set", "predictor", "quantity"])["mape_percent"]
    fit = sweeps.fit_predictors(three.values())["single_mu"].efficiency
    for name, slower in (("resolution", 1.0), ("frames", 1.2), ("steps", 0.9)):
        expected = 100 * abs(synthetic.MU / fit / slower - 1)
        assert errors[name, "single_mu", "latency_s"] == pytest.approx(expected)
        assert expected > 1  # no set has the common µ for its own


def test_a_set_that_was_not_measured_has_no_row(tmp_path: Path) -> None:
    table = synthetic.configurations()
    found = read(tmp_path, table[table["experiment"] != "steps"])
    assert list(table3(found)["set"].unique()) == ["resolution", "frames"]


def test_quantities_that_were_not_measured_have_no_row(three: dict[str, sweeps.Sweep]) -> None:
    sweep = three["resolution"]
    rows = sweep.rows.assign(gpu_energy_Wh=float("nan"))
    without = sweeps.Sweep(rows, sweep.model, sweep.accelerator, sweep.source)
    assert set(table3({"resolution": without})["quantity"]) == {"latency_s"}


def test_both_files_are_written_and_the_latex_says_what_it_is(
    three: dict[str, sweeps.Sweep], tmp_path: Path
) -> None:
    csv, tex = tables.write_table3(table3(three), tmp_path / "new" / "table3")
    assert csv.read_text().splitlines()[0] == "set,predictor,quantity,mape_percent,n"
    text = tex.read_text()
    assert "Mean absolute percentage error" in text
    assert "all sets together" in text
    assert r"\toprule" in text
    assert r"MAPE (\%)" in text
    assert text.count(r"\\") == 1 + 3 * 3 * 2
