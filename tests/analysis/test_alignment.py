"""Alignment: a planted period is found on its side and no other; and what the shipped records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import papermill
import pytest
import synthetic_campaign as synthetic
import tiny
from matplotlib.figure import Figure
from t2v_energy.analysis.alignment import COLUMNS, alignment_table, split
from t2v_energy.analysis.alignment_figure import figure_alignment
from t2v_energy.analysis.operator_rates import operator_rates
from t2v_energy.operator_suite import load_suite

ROOT = tiny.ROOT


def planted(period: int, gain: float, noise: float = 0.01) -> pd.DataFrame:
    """The suite's alignment series: cuDNN gains where ``period`` divides its keys, nothing else does."""
    rng, rows = np.random.default_rng(0), []
    for series in load_suite(ROOT).series:
        if "alignment" not in series.key:
            continue
        for case in series.cases:
            row: dict[str, Any] = {"series": series.key, "operator": case.operator, "status": "ok"}
            for name in ("heads", "head_size", "inputs", "outputs", "queries", "keys", "rows"):
                row[name] = float(getattr(case, name, float("nan")))
            row["attention_kernel"] = getattr(case, "kernel", None) or ""
            gains = row["attention_kernel"] == "cudnn" and row["keys"] % period == 0
            row["rate_TFLOPs"] = 500 * (1 + gain * gains) * np.exp(noise * rng.standard_normal())
            row |= {"call_s": 1e-2, "call_s_ci95": 1e-4}
            rows.append(row)
    return pd.DataFrame(rows)


def test_a_planted_period_is_found_on_the_side_of_the_keys() -> None:
    table = alignment_table(planted(128, 0.08))
    assert tuple(table.columns) == COLUMNS
    cudnn = table[table["kernel"] == "cudnn"].set_index(["length", "side"])
    for length in (32768, 75648, 16384):
        assert cudnn.loc[(length, "keys"), "period"] == 128
        assert cudnn.loc[(length, "both"), "period"] == 128
        assert cudnn.loc[(length, "keys"), "gain_percent"] == pytest.approx(8, abs=2)
        assert (
            cudnn.loc[(length, "keys"), "gain_percent"] > 5 * cudnn.loc[(length, "keys"), "edge_tile_percent"]
        )
    assert cudnn.loc[(32768, "keys"), "edge_tile_percent"] == pytest.approx(100 * 128 / 32768)
    inside = table["gain_percent"].between(table["gain_percent_ci95_low"], table["gain_percent_ci95_high"])
    assert inside.all()


def test_another_period_is_told_from_it() -> None:
    table = alignment_table(planted(64, 0.08))
    found = table[(table["kernel"] == "cudnn") & (table["side"] == "keys") & (table["length"] == 32768)]
    assert found["period"].tolist() == [64]


def test_where_nothing_gains_there_is_no_period() -> None:
    table = alignment_table(planted(128, 0.0, noise=1e-9))
    assert table["period"].isna().mean() > 0.6  # one in forty by chance, on each side
    assert table["gain_percent"].abs().max() < 1e-4


def test_too_few_sizes_split_nothing() -> None:
    assert split(np.array([128, 129, 130]), np.zeros(3), 128) is None


def test_what_the_shipped_records_say() -> None:
    records = sorted((ROOT / "results/raw/h200/operators").glob("*alignment*.json"))
    rates = operator_rates(records)
    table = alignment_table(rates)
    cudnn = table[table["kernel"] == "cudnn"]
    assert (cudnn.loc[cudnn["side"] != "queries", "period"] == 128).all()
    assert cudnn.loc[cudnn["side"] == "queries", "period"].isna().all()
    assert table.loc[table["kernel"] != "cudnn", "period"].isna().all()
    keys = cudnn[cudnn["side"] == "keys"]
    said = (ROOT / "docs/predicting.md").read_text(encoding="utf-8")
    low, high = keys["gain_percent"].min(), keys["gain_percent"].max()
    assert f"gains {low:.0f} to {high:.0f} % where 128" in said.replace("\n", " ")
    assert (keys["gain_percent_ci95_low"] > 5 * keys["edge_tile_percent"]).all()
    assert (keys["remainder_percent"].abs() <= keys["remainder_percent_ci95"]).all()
    assert isinstance(figure_alignment(rates), Figure)


def test_the_notebook_builds_tables_figures_rates_and_numbers(tmp_path: Path) -> None:
    base = synthetic.root(tmp_path / "root", synthetic.configurations())
    rates = base / "results/aggregated/h200/operator_rates.csv"
    records = sorted((ROOT / "results/raw/h200/operators").glob("*__operators_r*.json"))
    operator_rates(records).to_csv(rates, index=False, float_format="%.7g")
    papermill.execute_notebook(
        ROOT / "workflow" / "notebooks" / "operators.ipynb",
        tmp_path / "executed.ipynb",
        parameters={"root": str(base)},
        kernel_name="python3",
        progress_bar=False,
        cwd=str(base),
    )
    for name in ("alignment", "roofline"):
        assert (base / f"results/tables/h200/{name}.csv").stat().st_size > 0
        assert (base / f"figures/{name}.pdf").stat().st_size > 0
    built = json.loads((base / "results/calibrations/h200_rates.json").read_text())
    shipped = json.loads((ROOT / "config/rates/h200.json").read_text())
    assert built["cases"] == shipped["cases"]
    assert built["time"]["dense"]["expected"] == pytest.approx(shipped["time"]["dense"]["expected"], rel=1e-3)
    found = json.loads((base / "results/numbers/h200/operators.json").read_text())
    assert found["operators.alignment.cudnn128_32768.keys.period"]["value"] == 128
    assert "operators.alignment.cudnn128_32768.queries.period" not in found
    assert "operators.alignment.linear1536x1536_32768.rows.period" not in found
    rows = found["operators.alignment.linear1536x1536_32768.rows.gain"]
    assert rows["interval"][0] < rows["value"] < rows["interval"][1]
