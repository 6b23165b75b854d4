"""Table 3 against values computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import synthetic_campaign as synthetic
from t2v_energy.analysis import sweep as resolution
from t2v_energy.analysis import tables
from t2v_energy.errors import UserError
from t2v_energy.work import paper


@pytest.fixture
def sweep(tmp_path: Path) -> resolution.Sweep:
    base = synthetic.root(tmp_path / "root", synthetic.configurations())
    return resolution.read_sweep(base, "h200", Path("results/aggregated/h200/configurations.csv"))


def test_the_error_is_the_mean_of_absolute_percentages() -> None:
    # −10 % and +20 %: a mean of signed errors would be 5 %
    assert tables.mape_percent([90.0, 240.0], [100.0, 200.0]) == pytest.approx(15)


@pytest.mark.parametrize(("predicted", "measured"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_errors_that_make_no_sense_are_refused(predicted: list[float], measured: list[float]) -> None:
    with pytest.raises(UserError):
        tables.mape_percent(predicted, measured)


def test_table_3_equals_hand_computed_errors(sweep: resolution.Sweep) -> None:
    table = tables.table3({"resolution": sweep})
    assert tuple(table.columns) == tables.TABLE3_COLUMNS
    errors = table.set_index(["predictor", "quantity"])["mape_percent"]
    assert set(table["n"]) == {len(synthetic.SIZES)}
    assert errors["single_mu", "latency_s"] == pytest.approx(0, abs=1e-6)
    # predicted at 700 W, planted at 650 W: 700/650 − 1 at every point
    assert errors["single_mu", "gpu_energy_Wh"] == pytest.approx(100 * 50 / 650)
    by_hand = []
    for (_, row), flop in zip(sweep.rows.iterrows(), sweep.flop("study").sum(axis=1), strict=True):
        by_hand.append(100 * abs(flop / (0.456 * 989e12) - row["latency_s"]) / row["latency_s"])
    assert errors["paper", "latency_s"] == pytest.approx(sum(by_hand) / len(by_hand))
    assert (paper.EFFICIENCY, paper.MAX_POWER_W) == (0.456, 700)


def test_quantities_that_were_not_measured_have_no_row(sweep: resolution.Sweep) -> None:
    rows = sweep.rows.assign(gpu_energy_Wh=float("nan"))
    without = resolution.Sweep(rows, sweep.model, sweep.accelerator, sweep.source)
    assert set(tables.table3({"resolution": without})["quantity"]) == {"latency_s"}


def test_both_files_are_written_and_the_latex_says_what_it_is(
    sweep: resolution.Sweep, tmp_path: Path
) -> None:
    csv, tex = tables.write_table3(tables.table3({"resolution": sweep}), tmp_path / "new" / "table3")
    assert csv.read_text().splitlines()[0] == "set,predictor,quantity,mape_percent,n"
    text = tex.read_text()
    assert "Mean absolute percentage error" in text
    assert "same points" in text
    assert r"\toprule" in text
    assert r"MAPE (\%)" in text
    assert text.count(r"\\") == 7
