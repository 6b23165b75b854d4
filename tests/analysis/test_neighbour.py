"""neighbour.csv from rows whose differences are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from records import configuration, environment, make_record, write
from t2v_energy.aggregation import aggregate
from t2v_energy.analysis.neighbour import COLUMNS, EXPERIMENT, neighbour_table
from t2v_energy.errors import UserError
from t2v_energy.measurement.record import Neighbour, record_paths
from t2v_energy.measurement.sealing import verify

ROOT = Path(__file__).parents[2]
POWER_W = {"idle": 90.0, "busy": 650.0}


def rows(folder: Path, idle_s: Sequence[float], busy_s: Sequence[float]) -> pd.DataFrame:
    """configurations.csv of records with these step times (s, multiples of 0.5), one a pass."""
    for condition, steps_s in (("idle", idle_s), ("busy", busy_s)):
        config = configuration(neighbour=condition)
        other = Neighbour(name="x", uuid="GPU-1", mean_power_W=POWER_W[condition], in_use=True)
        for pass_index, step_s in enumerate(steps_s, start=1):
            record = make_record(
                config=config, experiment=EXPERIMENT, pass_index=pass_index, step_s=(step_s, step_s),
                environment=environment(neighbours=[other]),
            )  # fmt: skip
            write(record, folder / "raw")
    csv = folder / "configurations.csv"
    aggregate({EXPERIMENT: record_paths(folder / "raw")}, folder / "m.parquet", csv, ROOT)
    return pd.read_csv(csv)


def test_paired_differences_with_their_interval(tmp_path: Path) -> None:
    table = neighbour_table(rows(tmp_path, [0.5, 1.0, 0.5], [0.5, 1.0, 1.0]))
    assert list(table.columns) == list(COLUMNS)
    latency = table.set_index("quantity").loc["latency_s"]
    once_s = 1.1
    percent = np.array([0.0, 0.0, 100 * ((once_s + 50) / (once_s + 25) - 1)])
    half = 4.302653 * percent.std(ddof=1) / np.sqrt(3)
    assert latency["n"] == 3
    assert latency["difference_percent"] == pytest.approx(percent.mean(), rel=1e-5)
    assert latency["difference_percent_ci95_low"] == pytest.approx(percent.mean() - half, rel=1e-5)
    assert latency["difference_percent_ci95_high"] == pytest.approx(percent.mean() + half, rel=1e-5)
    assert latency["alone"] == pytest.approx(once_s + 50 * (0.5 + 1.0 + 0.5) / 3)
    assert latency["busy"] == pytest.approx(once_s + 50 * (0.5 + 1.0 + 1.0) / 3)
    assert set(table["quantity"]) == {"latency_s", "gpu_energy_Wh"}
    assert set(table["kind"]) == {"measured"}
    assert set(table["neighbours_power_W_alone"]) == {POWER_W["idle"]}
    assert set(table["neighbours_power_W_busy"]) == {POWER_W["busy"]}
    assert "neighbour" not in table["configuration"].iloc[0]


def test_drifts_that_both_conditions_share_cancel(tmp_path: Path) -> None:
    table = neighbour_table(rows(tmp_path, [0.5, 1.0, 1.5], [0.5, 1.0, 1.5]))
    assert table["difference_percent"].abs().max() < 1e-3
    assert (table["difference_percent_ci95_high"] - table["difference_percent_ci95_low"]).max() < 1e-2


def test_one_pass_has_no_interval(tmp_path: Path) -> None:
    table = neighbour_table(rows(tmp_path, [0.5], [1.0]))
    assert table["difference_percent_ci95_low"].isna().all()


def test_half_of_an_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neighbour idle alone"):
        neighbour_table(rows(tmp_path / "a", [0.5], []))
    with pytest.raises(UserError, match="2 passes beside an idle neighbour and 1 beside a busy one"):
        neighbour_table(rows(tmp_path / "b", [0.5, 0.5], [0.5]))


def test_the_document_says_what_the_sealed_records_give(tmp_path: Path) -> None:
    """The section of docs/scale.md about two GPUs: powers, differences and their intervals."""
    csv = tmp_path / "configurations.csv"
    aggregate(
        {EXPERIMENT: verify(ROOT / "results/raw/two-gpus/neighbour")}, tmp_path / "m.parquet", csv, ROOT
    )
    table = neighbour_table(pd.read_csv(csv)).set_index("quantity")
    text = " ".join((ROOT / "docs" / "scale.md").read_text(encoding="utf-8").split())
    latency, energy = table.loc["latency_s"], table.loc["gpu_energy_Wh"]
    powers = (latency["neighbours_power_W_busy"], latency["neighbours_power_W_alone"])
    assert "draws {:.0f} W instead of {:.0f} W".format(*powers) in text
    ends = ("", "_ci95_low", "_ci95_high")
    of_latency, of_energy = ([row[f"difference_percent{end}"] for end in ends] for row in (latency, energy))
    expected = (
        "latency differs by {:+.1f} % (95 % interval {:+.1f} to {:+.1f} %) "
        "and its GPU energy by {:+.1f} % ({:+.1f} to {:+.1f} %)"
    )
    assert expected.format(*of_latency, *of_energy).replace("-", "−") in text
    assert (table["difference_percent_ci95_low"] < 0).all()
    assert (table["difference_percent_ci95_high"] > 0).all(), "nothing shows"
    assert set(table["n"]) == {4}
